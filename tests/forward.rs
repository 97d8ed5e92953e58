//! The forward pass against transformers in float32, for every family, with the whole model in memory.

mod common;

use std::path::PathBuf;

use common::{MemoryModel, golden, nmse};
use proptest::prelude::*;
use tensorpager::device::cpu::CpuDevice;
use tensorpager::device::{Device, Kv, KvShape};
use tensorpager::model::forward::{Forward, PassLimits};
use tensorpager::model::kv::{KvPool, KvTable};
use tensorpager::model::pass::Pass;

/// The repository's fixtures, and those in TENSORPAGER_FIXTURES if it is set.
fn folders() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = common::MODELS
        .iter()
        .map(|m| common::fixtures().join(m))
        .collect();
    match std::env::var_os("TENSORPAGER_FIXTURES") {
        Some(dir) => {
            for name in [
                "tiny-qwen2",
                "tiny-qwen2-tied-f16",
                "tiny-llama3",
                "tiny-qwen3",
            ] {
                all.push(PathBuf::from(&dir).join(name));
            }
        }
        None => println!("skipped: larger fixtures (TENSORPAGER_FIXTURES is not set)"),
    }
    all
}

/// Each of them with each instruction set that this machine has.
fn folders_by_isa() -> impl Iterator<Item = (PathBuf, &'static str)> {
    let isas = CpuDevice::isas();
    folders()
        .into_iter()
        .flat_map(move |dir| isas.clone().into_iter().map(move |isa| (dir.clone(), isa)))
}

fn max_abs(a: &[f32], b: &[f32]) -> f64 {
    let differences = a.iter().zip(b).map(|(x, y)| f64::from((x - y).abs()));
    differences.fold(0.0, f64::max)
}

struct Rig {
    device: Device,
    forward: Forward,
    kv: Kv,
    pool: KvPool,
}

const ROWS: usize = 512;

impl Rig {
    fn new(model: &MemoryModel, threads: usize, isa: Option<&str>) -> Rig {
        let device = Device::cpu(Some(threads), isa).unwrap();
        let s = &model.spec;
        let forward = Forward::new(
            &device,
            s,
            &model.unit_list(),
            model.head_dtype(),
            &PassLimits {
                tokens: ROWS,
                wanted: ROWS,
                segments: ROWS,
                table: 64,
                context: 1024,
                select: false,
            },
        )
        .unwrap();
        let kv = device.kv(&KvShape {
            layers: s.layers,
            blocks: 64,
            kv_heads: s.kv_heads,
            head_size: s.head_size,
            dtype: model.head_dtype(),
        });
        let kv = kv.unwrap();
        Rig {
            device,
            forward,
            kv,
            pool: KvPool::new(64),
        }
    }

    /// One pass; the logits of its wanted rows, `[wanted, vocab]`.
    fn run(&mut self, model: &MemoryModel, pass: &Pass) -> Vec<f32> {
        let vocab = model.spec.vocab;
        let mut out = vec![f32::NAN; pass.wanted() * vocab];
        let mut source = model;
        self.forward
            .run(
                &self.device,
                &mut self.kv,
                &mut source,
                pass,
                &mut |first, n, block| {
                    for (r, values) in block.chunks_exact(n).enumerate() {
                        out[r * vocab + first..][..n].copy_from_slice(values);
                    }
                    Ok(())
                },
            )
            .unwrap();
        assert!(out.iter().all(|v| v.is_finite()), "every logit is written");
        out
    }

    /// Logits at every position, `chunk` rows a pass.
    fn score(&mut self, model: &MemoryModel, ids: &[u32], chunk: usize) -> Vec<f32> {
        let mut table = KvTable::default();
        let mut out = Vec::new();
        for (i, part) in ids.chunks(chunk).enumerate() {
            self.pool.extend(&mut table, part.len()).unwrap();
            let mut pass = Pass::default();
            pass.push_text(part, i * chunk, table.blocks(), part.len());
            out.extend(self.run(model, &pass));
        }
        self.pool.release(&mut table);
        out
    }
}

fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in row.iter().enumerate() {
        if *v > row[best] {
            best = i;
        }
    }
    best as u32
}

#[test]
fn logits_lose_less_than_transformers_own_16_bit_run() {
    for (dir, isa) in folders_by_isa() {
        let model = MemoryModel::load(&dir);
        let vocab = model.spec.vocab;
        for (i, g) in golden(&dir).iter().enumerate() {
            let mut rig = Rig::new(&model, 2, Some(isa));
            let got = rig.score(&model, &g.ids, ROWS);
            let kept: Vec<f32> = g
                .positions
                .iter()
                .flat_map(|p| got[p * vocab..][..vocab].iter().copied())
                .collect();
            assert_eq!(kept.len(), g.logits.len());
            let error = nmse(&kept, &g.logits);
            // float32 weights have no 16-bit run to beat: only rounding order may differ.
            let bar = g.half_nmse.unwrap_or(1e-9).max(1e-9);
            let most = max_abs(&kept, &g.logits);
            println!(
                "{} {isa} prompt {i}: nmse {error:.2e}, bar {bar:.2e}; largest {most:.2e}, bar {:?}",
                dir.display(),
                g.half_max
            );
            assert!(
                error < bar,
                "{} {isa} prompt {i}: {error:e} against {bar:e}",
                dir.display()
            );
            if let Some(bar) = g.half_max {
                assert!(
                    most < bar,
                    "{} {isa} prompt {i}: largest error {most:e} against {bar:e}",
                    dir.display()
                );
            }
        }
    }
}

#[test]
fn greedy_tokens_agree_while_the_margin_allows() {
    for (dir, isa) in folders_by_isa() {
        let model = MemoryModel::load(&dir);
        let vocab = model.spec.vocab;
        let mut steps = 0;
        for g in golden(&dir) {
            let mut rig = Rig::new(&model, 2, Some(isa));
            let mut table = KvTable::default();
            let mut tokens = g.ids.clone();
            for (step, (&want, &margin)) in g.greedy.iter().zip(&g.margins).enumerate() {
                // Where inputs of the MLP's products are rounded to bfloat16, logits move by up to what transformers' own
                // 16-bit run loses: a margin within that says nothing about correctness. Elsewhere they hardly move.
                let rounds = rig.device.describe().contains("avx512-bf16");
                let moved = if rounds {
                    g.half_max.unwrap_or(0.0)
                } else {
                    0.0
                };
                if margin < moved.max(0.02) {
                    break;
                }
                steps += 1;
                let start = table.len();
                let part = tokens[start..].to_vec();
                rig.pool.extend(&mut table, part.len()).unwrap();
                let mut pass = Pass::default();
                pass.push_text(&part, start, table.blocks(), 1);
                let logits = rig.run(&model, &pass);
                assert_eq!(logits.len(), vocab);
                assert_eq!(argmax(&logits), want, "{} {isa} step {step}", dir.display());
                tokens.push(want);
            }
        }
        assert!(
            steps >= 5,
            "{} {isa}: only {steps} steps were compared",
            dir.display()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// A token's logits are the same bits alone, in chunks of any size, beside any others, on any number of threads.
    #[test]
    fn results_do_not_depend_on_what_else_is_in_the_pass(
        which in 0usize..common::MODELS.len(),
        chunk in 1usize..40,
        threads in 1usize..4,
        lens in proptest::collection::vec(1usize..60, 1..5),
        seed in 0u32..1000,
        isa in proptest::sample::select(CpuDevice::isas()),
    ) {
        let model = MemoryModel::load(&common::fixtures().join(common::MODELS[which]));
        let vocab = model.spec.vocab;
        let prompts: Vec<Vec<u32>> = lens
            .iter()
            .enumerate()
            .map(|(i, n)| (0..*n).map(|j| (seed + 31 * i as u32 + 7 * j as u32) % vocab as u32).collect())
            .collect();
        let alone: Vec<Vec<f32>> = {
            let mut rig = Rig::new(&model, 2, Some(isa));
            prompts.iter().map(|p| rig.score(&model, p, ROWS)).collect()
        };
        // All prompts advance together, each by up to `chunk` tokens a pass.
        let mut rig = Rig::new(&model, threads, Some(isa));
        let mut tables: Vec<KvTable> = prompts.iter().map(|_| KvTable::default()).collect();
        let mut together: Vec<Vec<f32>> = vec![Vec::new(); prompts.len()];
        loop {
            let mut pass = Pass::default();
            let mut owners = Vec::new();
            for (i, p) in prompts.iter().enumerate() {
                let start = tables[i].len();
                let n = chunk.min(p.len() - start);
                if n > 0 {
                    rig.pool.extend(&mut tables[i], n).unwrap();
                    pass.push_text(&p[start..start + n], start, tables[i].blocks(), n);
                    owners.push((i, n));
                }
            }
            if owners.is_empty() {
                break;
            }
            let out = rig.run(&model, &pass);
            let mut at = 0;
            for (i, n) in owners {
                together[i].extend_from_slice(&out[at * vocab..(at + n) * vocab]);
                at += n;
            }
        }
        for (a, t) in alone.iter().zip(&together) {
            prop_assert!(a.iter().zip(t).all(|(x, y)| x.to_bits() == y.to_bits()));
        }
    }
}
