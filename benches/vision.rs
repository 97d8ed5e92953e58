//! Pictures: resizing and cutting into patches (megapixels a second), and one block of the vision tower of the 7B's geometry (patches a second).

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;
use tensorpager::device::{Device, WeightView};
use tensorpager::error::Result;
use tensorpager::media::{Options, Processor, Rgb};
use tensorpager::model::vision::{Limits, Slice, Tower};
use tensorpager::model::{UnitSource, UnitView};
use tensorpager::spec::{UnitKind, UnitSpec, VisionSpec, parse_config};
use tensorpager::units::{Dtype, UnitId};

/// The published 7B's config, with one block in its tower.
fn config() -> serde_json::Value {
    json!({
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 128000,
        "hidden_act": "silu", "tie_word_embeddings": false, "use_sliding_window": false,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_config": {
            "depth": 1, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
            "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [],
            "tokens_per_second": 2, "temporal_patch_size": 2
        }
    })
}

/// Random weights in memory; remembers how long the block computed.
struct Memory {
    units: Vec<(UnitSpec, Vec<Vec<u8>>)>,
    block: Duration,
}

impl Memory {
    fn new(units: Vec<UnitSpec>) -> Memory {
        let mut x = 1u32;
        let mut weight = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Around 0.03 either way, as trained weights are.
            (0x3c00 | (x >> 31 << 15) | (x >> 20 & 0xff)) as u16
        };
        let units = units.into_iter().map(|u| {
            let bytes = u.tensors.iter().map(|t| {
                let n = t.rows.len() * t.cols();
                (0..n).flat_map(|_| weight().to_le_bytes()).collect()
            });
            let bytes = bytes.collect();
            (u, bytes)
        });
        Memory {
            units: units.collect(),
            block: Duration::ZERO,
        }
    }
}

impl UnitSource for Memory {
    fn with_unit(
        &mut self,
        unit: UnitId,
        compute: &mut dyn FnMut(&UnitView<'_>) -> Result<()>,
    ) -> Result<()> {
        let Some((spec, bytes)) = self.units.iter().find(|(u, _)| u.id == unit) else {
            unreachable!("the tower asks for its own units");
        };
        let mut view = UnitView::empty();
        for (t, bytes) in spec.tensors.iter().zip(bytes) {
            view.set(
                t.role,
                WeightView::packed(Dtype::BF16, t.rows.len(), t.cols(), bytes),
            );
        }
        let started = Instant::now();
        compute(&view)?;
        if let UnitKind::VisionBlock(_) = spec.kind {
            self.block += started.elapsed();
        }
        Ok(())
    }

    fn gather_rows(
        &mut self,
        _: UnitId,
        _: &[u32],
        _: &mut dyn FnMut(usize, &WeightView<'_>) -> Result<()>,
    ) -> Result<()> {
        unreachable!("the tower gathers nothing")
    }
}

fn pixels(c: &mut Criterion, spec: &VisionSpec) {
    let settings = json!({"min_pixels": 3136, "max_pixels": 12845056});
    let processor = Processor::from_config(settings.as_object().unwrap(), None, spec).unwrap();
    let (width, height) = (1600, 1200);
    let data = (0..width * height * 3)
        .map(|i| (i * 31 % 251) as u8)
        .collect();
    let image = Rgb {
        width,
        height,
        data,
    };
    let mut group = c.benchmark_group("resize and patches");
    group.throughput(Throughput::Elements((width * height) as u64));
    for max in [1_003_520, 250_880] {
        let options = Options {
            max_pixels: Some(max),
            ..Options::default()
        };
        group.bench_function(format!("1600x1200 to {max} pixels"), |b| {
            b.iter(|| {
                let visual = processor.image(&image, "bench", &options).unwrap();
                let mut rows = vec![0.0; visual.grid.slice() * visual.patch_len()];
                visual.write_patches(0, &mut rows);
                black_box(rows)
            });
        });
    }
    group.finish();
}

fn block(c: &mut Criterion, spec: &VisionSpec, units: Vec<UnitSpec>, full: bool, side: usize) {
    let slice = Slice { h: side, w: side };
    let pixels = side * spec.patch;
    let mut spec = spec.clone();
    spec.full_attention_blocks = if full { vec![0] } else { vec![] };
    let kinds: Vec<_> = units.iter().map(|u| (u.id, u.kind)).collect();
    let mut memory = Memory::new(units);
    let device = Device::cpu(None, None).unwrap();
    let limits = Limits {
        wave: slice.patches(),
        slice: slice.patches(),
    };
    let mut tower = Tower::new(&device, &spec, &kinds, limits).unwrap();
    let mut group = c.benchmark_group("vision block");
    group.sample_size(10);
    group.throughput(Throughput::Elements(slice.patches() as u64));
    let name = if full { "full attention" } else { "windows" };
    group.bench_function(format!("7B geometry, {pixels}x{pixels}, {name}"), |b| {
        b.iter_custom(|n| {
            memory.block = Duration::ZERO;
            for _ in 0..n {
                tower
                    .run(
                        &device,
                        &mut memory,
                        &[slice],
                        &mut |_, _, rows| rows.fill(0.5),
                        &mut |_, rows| {
                            black_box(rows);
                            Ok(())
                        },
                    )
                    .unwrap();
            }
            memory.block
        });
    });
    group.finish();
}

fn vision(c: &mut Criterion) {
    let model = parse_config(&config()).unwrap();
    let spec = model.vision.clone().unwrap();
    let tower = |u: &UnitSpec| u.kind.to_string().starts_with("vision");
    let units: Vec<UnitSpec> = model
        .units(&|_| Dtype::BF16)
        .into_iter()
        .filter(tower)
        .collect();
    pixels(c, &spec);
    for (full, side) in [(false, 32), (true, 32), (false, 72), (true, 72)] {
        block(c, &spec, units.clone(), full, side);
    }
}

criterion_group!(benches, vision);
criterion_main!(benches);
