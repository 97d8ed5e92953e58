//! Configs that are absurd, ask for what is not there, or were mutated.

use proptest::prelude::*;

use super::*;

// hazard: config: refused; names the key
#[test]
fn absurd_and_unsupported_values_name_their_key() {
    use Code::{Config, Unsupported};
    let too_big = json!(1u64 << 31);
    let cases = [
        (
            with(llama(), "/model_type", json!("mamba")),
            "mamba",
            Unsupported,
        ),
        (with(llama(), "/model_type", json!(7)), "model_type", Config),
        (
            with(llama(), "/num_attention_heads", json!(0)),
            "num_attention_heads",
            Config,
        ),
        (
            with(llama(), "/num_hidden_layers", too_big.clone()),
            "num_hidden_layers",
            Config,
        ),
        (
            with(llama(), "/num_hidden_layers", json!(-1)),
            "num_hidden_layers",
            Config,
        ),
        (
            with(llama(), "/num_hidden_layers", json!(2.5)),
            "num_hidden_layers",
            Config,
        ),
        (
            with(llama(), "/num_hidden_layers", json!("5")),
            "num_hidden_layers",
            Config,
        ),
        (
            with(llama(), "/hidden_size", json!(u64::MAX)),
            "hidden_size",
            Config,
        ),
        (
            with(llama(), "/vocab_size", too_big.clone()),
            "vocab_size",
            Config,
        ),
        (
            with(llama(), "/intermediate_size", too_big.clone()),
            "intermediate_size",
            Config,
        ),
        (with(llama(), "/head_dim", json!(7)), "head_dim", Config),
        (with(llama(), "/head_dim", too_big), "head_dim", Config),
        (
            with(llama(), "/num_key_value_heads", json!(3)),
            "num_key_value_heads",
            Config,
        ),
        (
            with(llama(), "/num_key_value_heads", json!(16)),
            "num_key_value_heads",
            Config,
        ),
        (
            without(with(llama(), "/hidden_size", json!(63)), "/head_dim"),
            "num_attention_heads",
            Config,
        ),
        (
            with(llama(), "/rms_norm_eps", json!(0)),
            "rms_norm_eps",
            Config,
        ),
        (
            with(llama(), "/rms_norm_eps", json!("1e-5")),
            "rms_norm_eps",
            Config,
        ),
        (
            with(llama(), "/hidden_act", json!("gelu")),
            "hidden_act",
            Unsupported,
        ),
        (
            with(llama(), "/tie_word_embeddings", json!("yes")),
            "tie_word_embeddings",
            Config,
        ),
        (
            with(llama(), "/rope_theta", json!(0.5)),
            "rope_theta",
            Config,
        ),
        (
            with(llama(), "/rope_scaling", json!([1])),
            "rope_scaling",
            Config,
        ),
        (
            with(llama(), "/rope_scaling", json!({"type": "dynamic"})),
            "rope_scaling.type",
            Unsupported,
        ),
        (
            with(llama(), "/rope_scaling", json!({"type": "mrope"})),
            "rope_scaling.type",
            Unsupported,
        ),
        (
            with(llama(), "/rope_scaling", json!({"rope_type": "linear"})),
            "rope_scaling.factor",
            Config,
        ),
        (
            with(llama(), "/rope_scaling", json!({"factor": 2.0})),
            "rope_scaling.rope_type",
            Config,
        ),
        (
            with(
                llama(),
                "/rope_scaling",
                json!({"type": "linear", "factor": 0}),
            ),
            "rope_scaling.factor",
            Config,
        ),
        (
            with(llama(), "/rope_parameters", json!({"full_attention": {}})),
            "full_attention",
            Unsupported,
        ),
        (
            with(llama(), "/partial_rotary_factor", json!(0.5)),
            "partial_rotary_factor",
            Unsupported,
        ),
        (
            with(llama(), "/quantization_config", json!({"bits": 4})),
            "quantization_config",
            Unsupported,
        ),
        (
            with(vl_nested(), "/text_config/quantization_config", json!({})),
            "text_config.quant",
            Unsupported,
        ),
        (
            with(vl_flat(), "/text_config", json!(3)),
            "text_config",
            Config,
        ),
        (with(vl_flat(), "/head_dim", json!(32)), "head_dim", Config),
        (
            with(vl_flat(), "/rope_scaling/mrope_section", json!([8, 12, 13])),
            "mrope_section",
            Config,
        ),
        (
            with(vl_flat(), "/rope_scaling/mrope_section", json!([32])),
            "mrope_section",
            Config,
        ),
        (
            with(vl_flat(), "/image_token_id", json!(1320)),
            "image_token_id",
            Config,
        ),
        (
            with(vl_flat(), "/vision_config/num_heads", json!(3)),
            "vision_config.num_heads",
            Config,
        ),
        (
            with(
                vl_flat(),
                "/vision_config/fullatt_block_indexes",
                json!([4]),
            ),
            "fullatt_block",
            Config,
        ),
        (
            with(vl_flat(), "/vision_config/window_size", json!(14)),
            "window_size",
            Config,
        ),
        (
            with(vl_flat(), "/vision_config/out_hidden_size", json!(128)),
            "out_hidden_size",
            Config,
        ),
        (
            with(
                vl_nested(),
                "/vision_config/rope_parameters/rope_theta",
                json!(1e6),
            ),
            "rope_theta",
            Unsupported,
        ),
        (json!([]), "config.json", Config),
    ];
    for (config, key, code) in cases {
        let error = refusal(&config);
        assert!(error.what().contains(key), "{key}: {error}");
        assert_eq!(error.code(), code, "{key}: {error}");
        assert!(!error.fix().is_empty() && error.what().len() < 300);
    }
}

#[test]
fn messages_do_not_repeat_a_hostile_value() {
    let long = "x\u{1b}[2J".repeat(100_000);
    for config in [
        with(llama(), "/model_type", json!(long)),
        with(llama(), "/hidden_act", json!(long)),
        with(llama(), "/num_hidden_layers", json!(vec![0; 100_000])),
    ] {
        let error = refusal(&config).to_string();
        assert!(
            error.len() < 600 && !error.contains('\u{1b}'),
            "{}",
            error.len()
        );
    }
}

fn any_scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        (0u64..70).prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|x| json!(x)),
        "[a-z_0-9]{0,12}".prop_map(|s| json!(s)),
        prop::collection::vec(0u64..40, 0..6).prop_map(|v| json!(v)),
        Just(json!({})),
    ]
}

/// Paths of every key of the config, nested ones too.
fn paths(value: &Value, prefix: &str, out: &mut Vec<String>) {
    if let Value::Object(map) = value {
        for (key, inner) in map {
            out.push(format!("{prefix}/{key}"));
            paths(inner, &format!("{prefix}/{key}"), out);
        }
    }
}

proptest! {
    /// One key of a valid config replaced by anything: an error, or a spec whose units add up without overflow.
    #[test]
    fn one_mutation_never_panics(which in 0usize..5, at in any::<prop::sample::Index>(), value in any_scalar()) {
        let config = [llama(), mistral(), qwen3(), vl_flat(), vl_nested()][which].clone();
        let mut all = Vec::new();
        paths(&config, "", &mut all);
        let config = with(config, &all[at.index(all.len())], value);
        if let Ok(spec) = parse_config(&config) {
            prop_assert_eq!(spec.window.len(), spec.layers);
            let units = spec.units(&|_| Dtype::F32);
            let total: u64 = units.iter().map(|u| u.bytes(&|_| Dtype::F32)).sum();
            prop_assert!(total > 0 && total < 1 << 63);
        }
    }
}

/// Every limit at once: nothing overflows (arithmetic in release builds would wrap silently, so it is checked here).
#[test]
fn the_largest_geometry_does_not_overflow() {
    let mut c = llama();
    for (key, value) in [
        ("hidden_size", MAX_HIDDEN),
        ("intermediate_size", MAX_INTERMEDIATE),
        ("num_hidden_layers", MAX_LAYERS),
        ("num_attention_heads", MAX_HEADS),
        ("num_key_value_heads", MAX_HEADS),
        ("head_dim", MAX_HEAD_SIZE),
        ("vocab_size", MAX_VOCAB),
        ("max_position_embeddings", MAX_POSITIONS),
    ] {
        set(&mut c, key, json!(value));
    }
    let spec = parse_config(&c).unwrap();
    let units = spec.units(&|_| Dtype::F32);
    let mut total = 0u128;
    for t in units.iter().flat_map(|u| &u.tensors) {
        let elements: u128 = t.shape.iter().map(|&d| d as u128).product();
        assert!(elements * 4 < 1 << 62, "{}", t.name);
        total += t.rows.len() as u128 * t.cols() as u128 * 4;
    }
    assert!(total < 1 << 63);
    let summed: u64 = units.iter().map(|u| u.bytes(&|_| Dtype::F32)).sum();
    assert_eq!(u128::from(summed), total);
}
