//! Properties of the planner over random models, budgets and rates.

use proptest::prelude::*;

use super::super::strategy::{Budget, TierRates, UnitSize};
use super::*;

const MIB: u64 = 1 << 20;

fn unit(kind: UnitKind, mib: u64) -> UnitSize {
    UnitSize {
        kind,
        room_bytes: mib * MIB,
        read_bytes: mib * MIB,
    }
}

/// Embedding, layers, norm, head blocks, as a store orders them.
fn model(layers: &[u64], heads: &[u64]) -> Vec<UnitSize> {
    let mut v = vec![unit(UnitKind::Embed, 40)];
    v.extend(
        layers
            .iter()
            .enumerate()
            .map(|(i, m)| unit(UnitKind::Layer(i as u32), *m)),
    );
    v.push(unit(UnitKind::Norm, 1));
    v.extend(
        heads
            .iter()
            .enumerate()
            .map(|(i, m)| unit(UnitKind::Head(i as u32), *m)),
    );
    v
}

fn problem(
    units: &[UnitSize],
    cpu: u64,
    gpu: Option<u64>,
    depth: usize,
    tied: bool,
) -> Problem<'_> {
    Problem {
        units,
        budget: Budget {
            cpu_bytes: cpu * MIB,
            gpu_bytes: gpu.map(|g| g * MIB),
        },
        depth,
        tied_head: tied,
        rates: TierRates::default(),
    }
}

/// The best of every assignment of every unit of the pass, each with the embedding in memory and on disk. `None`: none fits.
fn exhaustive(p: &Problem<'_>) -> Option<f64> {
    let pass: Vec<usize> = (0..p.units.len())
        .filter(|i| is_streamed(p.units[*i].kind))
        .collect();
    let choices: &[Tier] = match p.budget.gpu_bytes {
        Some(_) => &[Tier::Disk, Tier::Cpu, Tier::Gpu],
        None => &[Tier::Disk, Tier::Cpu],
    };
    let mut best: Option<f64> = None;
    for mut code in 0..choices.len().pow(pass.len() as u32) {
        let mut tiers = p.all_on_disk();
        for unit in &pass {
            tiers[*unit] = choices[code % choices.len()];
            code /= choices.len();
        }
        for embed in [Tier::Disk, Tier::Cpu] {
            tiers[0] = embed;
            let needs = p.needs(&tiers);
            if needs.within(&p.budget) {
                let seconds = p.transfer_seconds(&needs);
                best = Some(best.map_or(seconds, |b| b.min(seconds)));
            }
        }
    }
    best
}

fn sizes() -> impl Strategy_<Value = (Vec<u64>, Vec<u64>)> {
    // Few distinct sizes, as models have, and all different, as sources read in place may.
    let few = (1u64..60, 1u64..60, 1u64..60);
    let same = (few, 1usize..6, 0usize..3).prop_map(|((a, b, c), n, h)| {
        let mut heads = vec![b; h];
        heads.push(c);
        (vec![a; n], heads)
    });
    let different = (
        proptest::collection::vec(1u64..60, 1..6),
        proptest::collection::vec(1u64..60, 1..3),
    );
    prop_oneof![same, different]
}

use proptest::strategy::Strategy as Strategy_;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn equal_to_exhaustive_search(
        (layers, heads) in sizes(),
        cpu in 0u64..500,
        depth in 0usize..4,
        tied in any::<bool>(),
    ) {
        let units = model(&layers, &heads);
        let p = problem(&units, cpu, None, depth, tied);
        let needs = p.needs(&place(&p));
        match exhaustive(&p) {
            Some(best) => {
                prop_assert!(needs.within(&p.budget), "{needs:?}");
                prop_assert_eq!(p.transfer_seconds(&needs), best);
            }
            None => prop_assert!(!needs.within(&p.budget)),
        }
    }

    #[test]
    fn equal_to_exhaustive_search_with_a_gpu(
        (layers, heads) in sizes(),
        cpu in 0u64..300,
        gpu in 0u64..300,
        depth in 0usize..3,
        tied in any::<bool>(),
        disk in 0.2f64..10.0,
        h2d in 1.0f64..50.0,
    ) {
        let units = model(&layers[..layers.len().min(4)], &heads[..heads.len().min(2)]);
        let mut p = problem(&units, cpu, Some(gpu), depth, tied);
        p.rates = TierRates { disk_gb_per_s: disk, h2d_gb_per_s: h2d };
        let needs = p.needs(&place(&p));
        match exhaustive(&p) {
            Some(best) => {
                prop_assert!(needs.within(&p.budget), "{needs:?}");
                let got = p.transfer_seconds(&needs);
                prop_assert!((got - best).abs() <= 1e-9 * best.max(1.0), "{got} against {best}");
            }
            None => prop_assert!(!needs.within(&p.budget)),
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Large models, sizes that differ by blocks: within the budget whenever anything is, no worse than all on disk, and
    /// better with every budget up to the quantum in which sizes are told apart.
    #[test]
    fn never_over_budget_never_worse_than_disk_and_monotone(
        layers in 1usize..90,
        base in 20u64..500,
        jitter in 0u64..4,
        head in 1u64..300,
        heads in 1usize..20,
        depth in 0usize..4,
        tied in any::<bool>(),
        gpu in prop_oneof![Just(None), (0u64..20_000).prop_map(Some)],
        cpu in 0u64..40_000,
        more in 0u64..3_000,
        disk in 0.2f64..10.0,
        h2d in 1.0f64..50.0,
    ) {
        let rates = TierRates { disk_gb_per_s: disk, h2d_gb_per_s: h2d };
        let mut units = model(&vec![base; layers], &vec![head; heads]);
        for (i, u) in units.iter_mut().enumerate() {
            let extra = ((i as u64 * 2_654_435_761) >> 7) % (jitter + 1) * BLOCK_BYTES;
            u.room_bytes += extra;
            u.read_bytes += extra;
        }
        let quantum = units.iter().map(|u| u.room_bytes).max().unwrap() / 512 + BLOCK_BYTES;
        let slack = quantum * units.len() as u64;
        let p = Problem { rates, ..problem(&units, cpu, gpu, depth, tied) };
        let disk = p.needs(&p.all_on_disk());
        let needs = p.needs(&place(&p));
        if disk.within(&p.budget) {
            prop_assert!(needs.within(&p.budget), "{needs:?}");
        }
        prop_assert!(p.transfer_seconds(&needs) <= p.transfer_seconds(&disk));
        for (cpu2, gpu2) in [(cpu + more, gpu), (cpu, gpu.map(|g| g + more))] {
            let q = Problem { rates, ..problem(&units, cpu2, gpu2, depth, tied) };
            let after = q.needs(&place(&q));
            if needs.within(&p.budget) {
                prop_assert!(after.within(&q.budget));
                let slowest = q.rates.disk_gb_per_s.min(q.rates.h2d_gb_per_s);
                let slack_s = slack as f64 / 1e9 / slowest;
                let allowed = p.transfer_seconds(&needs) + if jitter == 0 { 1e-12 } else { slack_s };
                prop_assert!(q.transfer_seconds(&after) <= allowed, "{after:?} after {needs:?}");
            }
        }
    }
}

#[test]
fn residents_lie_between_streamed_units() {
    let units = model(&[100; 28], &[90; 5]);
    let p = problem(&units, 1700, None, 1, true);
    let tiers = place(&p);
    let layers = &tiers[1..29];
    let longest = |t: Tier| layers.split(|x| *x != t).map(<[Tier]>::len).max().unwrap();
    assert!(
        longest(Tier::Cpu) <= 2 && longest(Tier::Disk) <= 2,
        "{layers:?}"
    );
}

/// On a GPU's machine too: never more than two units in a row that come from disk where a third of them does, nor that stay on the GPU.
#[test]
fn all_three_tiers_are_spread_over_the_pass() {
    let units = model(&[100; 30], &[90; 5]);
    let p = problem(&units, 1000, Some(1250), 1, true);
    let tiers = place(&p);
    let layers = &tiers[1..31];
    for tier in [Tier::Gpu, Tier::Cpu, Tier::Disk] {
        let count = layers.iter().filter(|t| **t == tier).count();
        assert!((7..=14).contains(&count), "{tier:?}: {count} of {layers:?}");
        let runs = layers.split(|t| *t != tier).map(<[Tier]>::len);
        assert!(runs.max().unwrap() <= 2, "{tier:?}: {layers:?}");
    }
}

#[test]
fn a_gpu_is_filled_before_host_memory_and_both_before_the_disk() {
    let units = model(&[100; 20], &[50; 2]);
    let p = problem(&units, 500, Some(1000), 1, false);
    let needs = p.needs(&place(&p));
    // 2 MiB is the page of the norm's 1 MiB; slots of 100 MiB leave room for 7 layers and both head blocks at most.
    assert_eq!(needs.gpu_paged_bytes / MIB, 2 + 7 * 100 + 50);
    assert_eq!(needs.gpu_resident_bytes / MIB, 1 + 7 * 100 + 50);
    assert!(needs.cpu_resident_bytes / MIB >= 450, "{needs:?}");
    assert_eq!(
        needs.copied_bytes,
        p.needs(&p.all_on_disk()).copied_bytes - 750 * MIB
    );
}

/// Two head blocks on the GPU leave host memory without a unit that fits it; one layer there instead leaves it a head block: fewer bytes
/// read, more copied. So the rates decide, and no rule that leaves them out is the best.
#[test]
fn the_rates_decide_where_sizes_do_not_divide() {
    let units = model(&[10; 3], &[6; 2]);
    // 1 MiB for the norm, two slots of 10, and room for 6 + 6 or 10 but not 16.
    let mut p = problem(&units, 8 + 4, Some(1 + 20 + 14), 1, false);
    let mut at = |disk, h2d| {
        p.rates = TierRates {
            disk_gb_per_s: disk,
            h2d_gb_per_s: h2d,
        };
        let needs = p.needs(&place(&p));
        assert_eq!(Some(p.transfer_seconds(&needs)), exhaustive(&p));
        (needs.streamed_bytes / MIB, needs.copied_bytes / MIB)
    };
    assert_eq!(
        at(1.0, 20.0),
        (26, 32),
        "a slow disk: the fewest bytes read"
    );
    assert_eq!(
        at(20.0, 1.0),
        (30, 30),
        "a slow bus: the fewest bytes copied"
    );
}

#[test]
fn a_model_whose_layers_all_differ_is_planned_at_once() {
    let mut units = model(&[300; 80], &[200; 16]);
    for (i, u) in units.iter_mut().enumerate() {
        u.room_bytes += i as u64 * MIB;
        u.read_bytes += i as u64 * MIB;
    }
    let started = std::time::Instant::now();
    let p = problem(&units, 12_000, Some(9_000), 2, false);
    let needs = p.needs(&place(&p));
    assert!(needs.within(&p.budget));
    assert!(
        started.elapsed().as_secs_f64() < 2.0,
        "{:?}",
        started.elapsed()
    );
}
