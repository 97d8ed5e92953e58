mod hostile;

use serde_json::{Value, json};

use super::*;
use crate::spec::{RopeScaling, RopeSpec};

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 512,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "torch_dtype": "float16"
    })
}

fn mistral() -> Value {
    let mut c = llama();
    set(&mut c, "model_type", json!("mistral"));
    set(&mut c, "sliding_window", json!(16));
    c
}

fn qwen2() -> Value {
    json!({
        "model_type": "qwen2", "hidden_size": 192, "intermediate_size": 500, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 1100, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "hidden_act": "silu", "tie_word_embeddings": true, "dtype": "float16", "sliding_window": null,
        "use_sliding_window": false, "max_window_layers": 28,
        "layer_types": ["full_attention", "full_attention", "full_attention"]
    })
}

fn qwen3() -> Value {
    let mut c = qwen2();
    set(&mut c, "model_type", json!("qwen3"));
    set(&mut c, "head_dim", json!(128));
    set(&mut c, "attention_bias", json!(false));
    c
}

/// The style of the hub: the text's keys at the top.
fn vl_flat() -> Value {
    json!({
        "model_type": "qwen2_5_vl", "hidden_act": "silu", "image_token_id": 1298, "video_token_id": 1299,
        "vision_start_token_id": 1295, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}, "max_position_embeddings": 4096,
        "vocab_size": 1320, "max_window_layers": 4, "sliding_window": 32768, "use_sliding_window": false,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 4, "hidden_act": "silu", "hidden_size": 160, "intermediate_size": 212, "num_heads": 2,
            "in_chans": 3, "out_hidden_size": 256, "patch_size": 14, "spatial_merge_size": 2,
            "window_size": 112, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2, "temporal_patch_size": 2
        }
    })
}

/// The same model as transformers 5 writes it.
fn vl_nested() -> Value {
    let flat = vl_flat();
    let mut text = json!({
        "model_type": "qwen2_5_vl_text", "dtype": "bfloat16", "sliding_window": null,
        "layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"],
        "rope_parameters":
            {"mrope_section": [8, 12, 12], "rope_theta": 1000000.0, "rope_type": "default", "type": "mrope"}
    });
    for key in [
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "vocab_size",
        "max_window_layers",
        "use_sliding_window",
    ] {
        set(&mut text, key, flat[key].clone());
    }
    let mut vision = flat["vision_config"].clone();
    set(&mut vision, "in_channels", json!(3));
    set(
        &mut vision,
        "rope_parameters",
        json!({"rope_theta": 10000.0, "rope_type": "axial"}),
    );
    json!({
        "model_type": "qwen2_5_vl", "dtype": "bfloat16", "image_token_id": 1298, "video_token_id": 1299,
        "vision_start_token_id": 1295, "tie_word_embeddings": false, "text_config": text, "vision_config": vision
    })
}

fn set(config: &mut Value, key: &str, value: Value) {
    config[key] = value;
}

fn without(mut config: Value, path: &str) -> Value {
    let (parent, key) = path.rsplit_once('/').unwrap();
    let parent = config.pointer_mut(parent).unwrap();
    parent.as_object_mut().unwrap().shift_remove(key).unwrap();
    config
}

fn with(mut config: Value, path: &str, value: Value) -> Value {
    let (parent, key) = path.rsplit_once('/').unwrap();
    config.pointer_mut(parent).unwrap()[key] = value;
    config
}

fn refusal(config: &Value) -> Error {
    match parse_config(config) {
        Err(e) => e,
        Ok(spec) => panic!("accepted: {config} as {spec:?}"),
    }
}

#[test]
fn a_flat_llama_reads_whole() {
    let spec = parse_config(&llama()).unwrap();
    assert_eq!(
        spec,
        ModelSpec {
            family: Family::Llama,
            model_type: "llama".to_string(),
            hidden: 64,
            intermediate: 172,
            layers: 5,
            heads: 8,
            kv_heads: 4,
            head_size: 8,
            vocab: 512,
            rms_eps: 1e-5,
            tied_head: true,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            window: vec![None; 5],
            rope: RopeSpec {
                theta: 10000.0,
                scaling: RopeScaling::Default,
                mrope_section: None
            },
            max_positions: 512,
            config_dtype: Some(Dtype::F16),
            vision: None,
        }
    );
}

#[test]
fn the_two_styles_of_a_vision_model_are_one_model() {
    let flat = parse_config(&vl_flat()).unwrap();
    assert_eq!(flat, parse_config(&vl_nested()).unwrap());
    assert_eq!(flat.rope.mrope_section, Some([8, 12, 12]));
    assert_eq!(flat.config_dtype, Some(Dtype::BF16));
    assert!(flat.qkv_bias && !flat.o_bias);
    let vision = flat.vision.unwrap();
    assert_eq!(vision.full_attention_blocks, [1, 3]);
    assert_eq!(
        (vision.channels, vision.heads, vision.tokens_per_second),
        (3, 2, 2.0)
    );
}

#[test]
fn flags_follow_the_family() {
    let q2 = parse_config(&qwen2()).unwrap();
    assert!(q2.qkv_bias && !q2.o_bias && !q2.qk_norm && !q2.mlp_bias);
    assert_eq!(q2.head_size, 64, "absent head_dim is hidden/heads");
    let q3 = parse_config(&qwen3()).unwrap();
    assert!(!q3.qkv_bias && !q3.o_bias && q3.qk_norm);
    assert_eq!(q3.head_size, 128);
    let biased = parse_config(&with(qwen3(), "/attention_bias", json!(true))).unwrap();
    assert!(biased.qkv_bias && biased.o_bias);
    let config = with(
        with(llama(), "/attention_bias", json!(true)),
        "/mlp_bias",
        json!(true),
    );
    let spec = parse_config(&config).unwrap();
    assert!(spec.qkv_bias && spec.o_bias && spec.mlp_bias);
}

#[test]
fn every_missing_key_is_named() {
    let common = [
        "/model_type",
        "/hidden_size",
        "/intermediate_size",
        "/num_hidden_layers",
        "/num_attention_heads",
        "/vocab_size",
        "/max_position_embeddings",
        "/rms_norm_eps",
        "/hidden_act",
        "/tie_word_embeddings",
    ];
    let rope = ["/rope_theta"];
    let kv = ["/num_key_value_heads"];
    let vl = [
        "/vision_config",
        "/image_token_id",
        "/video_token_id",
        "/vision_start_token_id",
        "/rope_scaling/mrope_section",
        "/vision_config/depth",
        "/vision_config/hidden_size",
        "/vision_config/hidden_act",
        "/vision_config/intermediate_size",
        "/vision_config/num_heads",
        "/vision_config/in_chans",
        "/vision_config/out_hidden_size",
        "/vision_config/patch_size",
        "/vision_config/temporal_patch_size",
        "/vision_config/spatial_merge_size",
        "/vision_config/window_size",
        "/vision_config/fullatt_block_indexes",
        "/vision_config/tokens_per_second",
    ];
    let cases: [(Value, Vec<&str>); 6] = [
        (llama(), [&common[..], &rope].concat()),
        (
            mistral(),
            [&common[..], &rope, &kv, &["/sliding_window"]].concat(),
        ),
        (
            qwen2(),
            [&common[..], &kv, &["/rope_parameters/rope_theta"]].concat(),
        ),
        (
            qwen3(),
            [
                &common[..],
                &kv,
                &["/rope_parameters/rope_theta", "/head_dim"],
            ]
            .concat(),
        ),
        (vl_flat(), [&common[..], &rope, &kv, &vl].concat()),
        (
            vl_nested(),
            vec![
                "/text_config/hidden_size",
                "/text_config/num_key_value_heads",
            ],
        ),
    ];
    for (config, paths) in cases {
        for path in paths {
            let error = refusal(&without(config.clone(), path));
            let key = path[1..].replace('/', ".");
            let key = key.strip_prefix("rope_parameters.").unwrap_or(&key);
            assert_eq!(error.code(), Code::Config, "{path}: {error}");
            assert!(
                error.what().contains(&format!("`{key}`")),
                "{path}: {error}"
            );
        }
    }
    // A model type without sections would otherwise rotate by text positions alone.
    let error = refusal(&without(vl_flat(), "/rope_scaling"));
    assert!(error.what().contains("mrope_section"), "{error}");
}

#[test]
fn the_documented_exceptions() {
    let spec = parse_config(&without(llama(), "/num_key_value_heads")).unwrap();
    assert_eq!(spec.kv_heads, 8);
    let spec = parse_config(&with(llama(), "/head_dim", Value::Null)).unwrap();
    assert_eq!(spec.head_size, 8);
    // Llama 2's own config: written by transformers 4.31, before the key existed.
    let old = with(
        without(llama(), "/rope_theta"),
        "/rope_scaling",
        Value::Null,
    );
    for (version, ok) in [
        ("4.31.0.dev0", true),
        ("4.32.0", false),
        ("5.17.0", false),
        ("x", false),
    ] {
        let parsed = parse_config(&with(old.clone(), "/transformers_version", json!(version)));
        assert_eq!(parsed.is_ok(), ok, "{version}");
        if let Ok(spec) = parsed {
            assert_eq!(spec.rope.theta, 10_000.0);
        }
    }
    // Releases before 5 wrote the vision models' tying beside the text's keys.
    let config = with(
        without(vl_nested(), "/tie_word_embeddings"),
        "/text_config/tie_word_embeddings",
        json!(true),
    );
    assert!(parse_config(&config).unwrap().tied_head);
}

#[test]
fn sliding_windows() {
    assert_eq!(parse_config(&mistral()).unwrap().window, vec![Some(16); 5]);
    let full = with(mistral(), "/sliding_window", Value::Null);
    assert_eq!(parse_config(&full).unwrap().window, vec![None; 5]);

    let flat = without(qwen2(), "/layer_types");
    let gated = with(flat.clone(), "/sliding_window", json!(32));
    assert_eq!(
        parse_config(&gated).unwrap().window,
        vec![None; 3],
        "use_sliding_window is false"
    );
    let on = with(
        with(gated.clone(), "/use_sliding_window", json!(true)),
        "/max_window_layers",
        json!(1),
    );
    assert_eq!(
        parse_config(&on).unwrap().window,
        [None, Some(32), Some(32)]
    );
    let typed = with(
        on.clone(),
        "/layer_types",
        json!(["sliding_attention", "full_attention", "sliding_attention"]),
    );
    assert_eq!(
        parse_config(&typed).unwrap().window,
        [Some(32), None, Some(32)]
    );

    let contradictions = [
        (
            without(on.clone(), "/max_window_layers"),
            "max_window_layers",
        ),
        (without(on.clone(), "/sliding_window"), "sliding_window"),
        (
            without(gated.clone(), "/use_sliding_window"),
            "use_sliding_window",
        ),
        (
            with(typed.clone(), "/use_sliding_window", json!(false)),
            "layer_types",
        ),
        (
            with(typed.clone(), "/layer_types", json!(["full_attention"])),
            "layer_types",
        ),
        (
            with(
                typed,
                "/layer_types",
                json!(["chunked_attention", "a", "b"]),
            ),
            "layer_types",
        ),
        (
            with(mistral(), "/layer_types", json!(vec!["full_attention"; 5])),
            "layer_types",
        ),
        (
            with(llama(), "/layer_types", json!(vec!["sliding_attention"; 5])),
            "layer_types",
        ),
        (
            with(mistral(), "/sliding_window", json!(0)),
            "sliding_window",
        ),
    ];
    for (config, key) in contradictions {
        let error = refusal(&config);
        assert!(error.what().contains(&format!("`{key}`")), "{error}");
    }
}

#[test]
fn rope_types_old_and_new_spelling() {
    let llama3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256, "rope_type": "llama3"});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 256,
    };
    let old = parse_config(&with(llama(), "/rope_scaling", llama3.clone())).unwrap();
    assert_eq!(old.rope.scaling, expected);
    let mut parameters = llama3.clone();
    set(&mut parameters, "rope_theta", json!(500000.0));
    let new = parse_config(&with(
        without(llama(), "/rope_theta"),
        "/rope_parameters",
        parameters,
    ))
    .unwrap();
    assert_eq!((new.rope.scaling, new.rope.theta), (expected, 500000.0));

    let linear = with(
        llama(),
        "/rope_scaling",
        json!({"type": "linear", "factor": 2}),
    );
    let spec = parse_config(&linear).unwrap();
    assert_eq!(spec.rope.scaling, RopeScaling::Linear { factor: 2.0 });

    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    let spec = parse_config(&with(qwen2(), "/rope_scaling", yarn.clone())).unwrap_err();
    assert!(
        spec.what().contains("rope_theta"),
        "rope_scaling hides rope_parameters: {spec}"
    );
    let spec = parse_config(&with(llama(), "/rope_scaling", yarn)).unwrap();
    assert_eq!(
        spec.rope.scaling,
        RopeScaling::Yarn {
            factor: 4.0,
            original_max_positions: 128,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }
    );
    let ratio = json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 128,
        "beta_fast": 16, "beta_slow": 0, "mscale": 0.7, "mscale_all_dim": 0.0, "truncate": false});
    let spec = parse_config(&with(llama(), "/rope_scaling", ratio)).unwrap();
    assert_eq!(
        spec.rope.scaling,
        RopeScaling::Yarn {
            factor: 4.0,
            original_max_positions: 128,
            beta_fast: 16.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: Some(0.7),
            mscale_all_dim: None,
            truncate: false,
        }
    );
}
