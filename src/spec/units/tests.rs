use std::collections::BTreeSet;

use super::*;
use crate::spec::{Family, RopeScaling, RopeSpec};

fn spec() -> ModelSpec {
    ModelSpec {
        family: Family::Qwen3,
        model_type: "qwen3".to_string(),
        hidden: 192,
        intermediate: 512,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_size: 64,
        vocab: 1100,
        rms_eps: 1e-6,
        tied_head: false,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: true,
        window: vec![None; 2],
        rope: RopeSpec {
            theta: 1e6,
            scaling: RopeScaling::Default,
            mrope_section: None,
        },
        max_positions: 128,
        config_dtype: None,
        vision: None,
    }
}

fn vision() -> VisionSpec {
    VisionSpec {
        depth: 2,
        hidden: 160,
        intermediate: 212,
        out_hidden: 192,
        full_attention_blocks: vec![1],
        ..VisionSpec::tiny()
    }
}

fn bf16(_: &str) -> Dtype {
    Dtype::BF16
}

#[test]
fn units_stand_in_the_documented_order() {
    let mut s = spec();
    s.vision = Some(vision());
    let kinds: Vec<UnitKind> = s.units(&bf16).iter().map(|u| u.kind).collect();
    use UnitKind::*;
    assert_eq!(
        kinds,
        [
            Embed,
            Layer(0),
            Layer(1),
            Norm,
            Head(0),
            VisionEmbed,
            VisionBlock(0),
            VisionBlock(1),
            VisionMerger
        ]
    );
    for (i, unit) in s.units(&bf16).iter().enumerate() {
        assert_eq!(unit.id.index(), i);
    }
}

#[test]
fn a_layer_with_every_option_has_its_shapes() {
    let units = spec().units(&bf16);
    let layer = &units[2];
    let find = |role: Role| layer.tensors.iter().find(|t| t.role == role).unwrap();
    assert_eq!(find(Role::QProj).shape, [256, 192]);
    assert_eq!(find(Role::QBias).shape, [256]);
    assert_eq!(find(Role::KProj).shape, [128, 192]);
    assert_eq!(find(Role::VBias).shape, [128]);
    assert_eq!(find(Role::OProj).shape, [192, 256]);
    assert_eq!(find(Role::OBias).shape, [192]);
    assert_eq!(find(Role::KNorm).shape, [64]);
    assert_eq!(find(Role::DownProj).shape, [192, 512]);
    assert_eq!(find(Role::UpBias).shape, [512]);
    assert_eq!(
        find(Role::DownProj).name,
        "model.layers.1.mlp.down_proj.weight"
    );
    assert_eq!(find(Role::QBias).rows, 0..1);
    assert_eq!(find(Role::QProj).rows, 0..256);
    let roles: BTreeSet<usize> = layer.tensors.iter().map(|t| t.role.index()).collect();
    assert_eq!(roles.len(), layer.tensors.len(), "one tensor a role");
    let mut bare = spec();
    (bare.qkv_bias, bare.o_bias, bare.mlp_bias, bare.qk_norm) = (false, false, false, false);
    assert_eq!(bare.units(&bf16)[1].tensors.len(), 9);
    assert_eq!(layer.tensors.len(), 18);
}

#[test]
fn head_blocks_cover_the_vocabulary_once_and_are_no_larger_than_a_layer() {
    for (vocab, tied) in [
        (1, false),
        (63, true),
        (64, false),
        (1100, true),
        (70_001, false),
        (152_064, true),
    ] {
        for head_type in [Dtype::BF16, Dtype::F32] {
            let mut s = spec();
            (s.vocab, s.tied_head) = (vocab, tied);
            let dtype_of = |name: &str| {
                let head = name == "lm_head.weight" || name == "model.embed_tokens.weight";
                if head { head_type } else { Dtype::BF16 }
            };
            let units = s.units(&dtype_of);
            let layer_bytes = units[1].bytes(&dtype_of);
            let blocks: Vec<&UnitSpec> = units
                .iter()
                .filter(|u| matches!(u.kind, UnitKind::Head(_)))
                .collect();
            let mut next = 0;
            for (i, block) in blocks.iter().enumerate() {
                let t = &block.tensors[0];
                assert_eq!(
                    t.name,
                    if tied {
                        "model.embed_tokens.weight"
                    } else {
                        "lm_head.weight"
                    }
                );
                assert_eq!((t.role, t.rows.start), (Role::Head, next));
                assert!(!t.rows.is_empty() && block.bytes(&dtype_of) <= layer_bytes);
                assert!(i + 1 == blocks.len() || t.rows.len() % HEAD_ROWS_MULTIPLE == 0);
                next = t.rows.end;
            }
            assert_eq!(next, vocab);
        }
    }
    assert_eq!(
        head_block_rows(1000, 4096, 10),
        64,
        "never an endless split"
    );
}

#[test]
fn vision_tensors_have_their_shapes() {
    let mut s = spec();
    s.vision = Some(vision());
    let units = s.units(&bf16);
    let named = |name: &str| {
        let all = units.iter().flat_map(|u| &u.tensors);
        all.clone().find(|t| t.name == name).unwrap()
    };
    let patch = named("visual.patch_embed.proj.weight");
    assert_eq!(
        (patch.shape.as_slice(), patch.cols()),
        (&[160, 3, 2, 14, 14][..], 1176)
    );
    assert_eq!(named("visual.blocks.1.attn.qkv.weight").shape, [480, 160]);
    assert_eq!(named("visual.merger.mlp.0.weight").shape, [640, 640]);
    assert_eq!(named("visual.merger.mlp.2.weight").shape, [192, 640]);
    assert_eq!(named("visual.blocks.0.mlp.up_proj.bias").shape, [212]);
}

#[test]
fn names_of_every_style_meet() {
    for (name, canonical) in [
        (
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
        ),
        ("model.language_model.layers.0.a", "model.layers.0.a"),
        (
            "model.language_model.embed_tokens.weight",
            "model.embed_tokens.weight",
        ),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.model.layers.3.a", "model.layers.3.a"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        (
            "model.visual.blocks.0.norm1.weight",
            "visual.blocks.0.norm1.weight",
        ),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.0.a", "model.layers.0.a"),
        ("norm.weight", "model.norm.weight"),
        ("model.visual", "model.visual"),
        ("", ""),
    ] {
        assert_eq!(canonical_name(name), canonical, "{name}");
        assert_eq!(canonical_name(canonical), canonical, "idempotent");
    }
}
