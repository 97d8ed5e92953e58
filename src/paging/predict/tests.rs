use super::*;
use crate::paging::{GpuPart, Placement, Ring};

const MIB: u64 = 1 << 20;

fn model(layers: u32) -> Vec<UnitSize> {
    let unit = |kind, mib: u64| UnitSize {
        kind,
        room_bytes: mib * MIB,
        read_bytes: mib * MIB,
    };
    let mut v = vec![unit(UnitKind::Embed, 200)];
    v.extend((0..layers).map(|i| unit(UnitKind::Layer(i), 100)));
    v.push(unit(UnitKind::Norm, 1));
    v.push(unit(UnitKind::Head(0), 100));
    v
}

fn rates(disk: f64, memory: f64) -> MachineRates {
    MachineRates {
        disk_gb_per_s: disk,
        h2d_gb_per_s: None,
        compute: ComputeRates {
            memory_gb_per_s: memory,
            gflops: 400.0,
            element_bytes: 2.0,
            points: vec![],
        },
    }
}

fn work(rows: usize) -> PassWork {
    PassWork {
        rows,
        wanted: rows,
        element_bytes: 2.0,
        ..PassWork::default()
    }
}

fn at(budget_mib: u64, disk: f64, memory: f64, rows: usize) -> PassCost {
    let units = model(20);
    let plan = Plan::of_sizes(&units, budget_mib * MIB, 1, &Placement::Auto, true).unwrap();
    predict(&units, &plan, &rates(disk, memory), &work(rows))
}

#[test]
fn two_slots_reach_the_bound_where_units_are_alike() {
    for (disk, memory) in [(1.0, 20.0), (10.0, 3.0)] {
        let c = at(300, disk, memory, 1);
        assert!(c.pass_s >= c.bound_s * 0.999, "{c:?}");
        assert!(c.pass_s <= c.bound_s * 1.02, "{c:?}");
    }
    // As fast as one another: embedding rows wait for the unit being read, and computing for them.
    let c = at(300, 5.0, 5.0, 1);
    assert!(c.pass_s <= c.bound_s * 1.001 + 0.1 * 1.049 / 5.0, "{c:?}");
}

#[test]
fn spread_residents_keep_the_disk_busy() {
    // Half the model resident, a disk half as fast as computing: the disk is the bound and never waits for long.
    let c = at(1300, 2.0, 4.0, 1);
    assert!(c.pass_s <= c.bound_s * 1.10, "{c:?}");
    // The head is among the residents: its rows serve as the embedding, and none are gathered.
    assert_eq!(c.disk_bytes, 1100 * MIB);
}

#[test]
fn a_pass_costs_the_same_until_computing_catches_up() {
    let one = at(300, 1.0, 20.0, 1);
    let eight = at(300, 1.0, 20.0, 8);
    assert!(eight.pass_s < one.pass_s * 1.01, "{one:?} {eight:?}");
    let units = model(20);
    let plan = Plan::of_sizes(&units, 300 * MIB, 1, &Placement::Auto, true).unwrap();
    let rows = rows_that_hide_the_disk(&units, &plan, &rates(1.0, 20.0), 2.0, 1 << 20).unwrap();
    // F · b / (2 · B): 400 · 2 / (2 · 1)
    assert!((390..=410).contains(&rows), "{rows}");
}

#[test]
fn a_gpu_waits_for_the_slower_of_disk_and_copy() {
    // 21 units: 7 on the GPU, 7 in host memory, 7 on disk; hardly any computing.
    let units = model(20);
    let mut tiers = vec![Tier::Disk; units.len()];
    for (i, tier) in tiers.iter_mut().enumerate() {
        *tier = [Tier::Gpu, Tier::Cpu, Tier::Disk][i % 3];
    }
    let cpu = Plan::of_sizes(&units, 300 * MIB, 1, &Placement::Auto, true).unwrap();
    let count = |t: Tier| {
        let of = units.iter().zip(&tiers);
        of.filter(|(u, x)| is_streamed(u.kind) && **x == t).count() as u64
    };
    let plan = Plan {
        streamed_bytes: count(Tier::Disk) * 100 * MIB,
        tiers: tiers.clone(),
        gather_bytes: 0,
        gpu: ring(64),
        ..cpu
    };
    let at = |disk: f64, h2d: f64| {
        let rates = MachineRates {
            h2d_gb_per_s: Some(h2d),
            ..rates(disk, 2000.0)
        };
        predict(&units, &plan, &rates, &work(1))
    };
    for (disk, h2d) in [(2.0, 20.0), (20.0, 5.0), (6.0, 12.0)] {
        let c = at(disk, h2d);
        let copied = (count(Tier::Disk) + count(Tier::Cpu)) * 100 * MIB;
        assert_eq!(c.copied_bytes, copied);
        let bound = (plan.streamed_bytes as f64 / disk).max(copied as f64 / h2d) / 1e9;
        assert!((c.bound_s / bound - 1.0).abs() < 0.01, "{c:?} {bound}");
        assert!(
            c.pass_s >= bound * 0.99 && c.pass_s <= bound * 1.05,
            "{c:?}"
        );
    }
}

/// So many frames of 4 MiB.
fn ring(frames: usize) -> Option<GpuPart> {
    Some(GpuPart {
        resident_bytes: 0,
        paged_bytes: 0,
        copied_bytes: 0,
        ring: Ring {
            frames,
            frame_bytes: 4 * MIB,
        },
    })
}

/// All weights in host memory, beside a GPU.
fn from_host(kv_mib: u64, h2d: f64, memory: f64) -> PassCost {
    let units = model(20);
    let plan = Plan {
        tiers: vec![Tier::Cpu; units.len()],
        streamed_bytes: 0,
        gather_bytes: 0,
        slots: 2,
        gpu: ring(64),
        ..Plan::of_sizes(&units, 300 * MIB, 1, &Placement::Auto, true).unwrap()
    };
    let work = PassWork {
        kv_to_gpu_bytes: kv_mib * MIB,
        kv_from_gpu_bytes: MIB,
        ..work(1)
    };
    let rates = MachineRates {
        h2d_gb_per_s: Some(h2d),
        ..rates(1.0, memory)
    };
    predict(&units, &plan, &rates, &work)
}

#[test]
fn keys_and_values_share_the_bus_with_weights() {
    // 21 units of 100 MiB and as much of keys and values: twice the bytes, twice the time.
    let (without, with) = (from_host(0, 10.0, 2000.0), from_host(2100, 10.0, 2000.0));
    assert_eq!(with.copied_bytes, 2 * without.copied_bytes);
    assert_eq!(with.copied_back_bytes, MIB);
    let grew = with.pass_s / without.pass_s;
    assert!((1.95..2.1).contains(&grew), "{with:?} {without:?}");
    assert!((with.bound_s / without.bound_s - 2.0).abs() < 1e-9);
    assert!(with.pass_s >= with.bound_s * 0.999, "{with:?}");
    // Where computing takes long, they come meanwhile.
    let (without, with) = (from_host(0, 50.0, 5.0), from_host(210, 50.0, 5.0));
    assert!(with.pass_s < without.pass_s * 1.02, "{with:?} {without:?}");
    // Where little else is to do, they are what a pass takes.
    let c = from_host(21_000, 10.0, 2000.0);
    assert!(
        c.pass_s >= c.bound_s * 0.999 && c.pass_s < c.bound_s * 1.1,
        "{c:?}"
    );
}

/// All from disk through a GPU, four milliseconds of computing a unit at 25 GB/s.
fn through_frames(slots: usize, frames: usize, disk: f64, memory: f64) -> PassCost {
    let units = model(20);
    let plan = Plan {
        tiers: vec![Tier::Disk; units.len()],
        gather_bytes: 0,
        slots,
        gpu: ring(frames),
        ..Plan::of_sizes(&units, 300 * MIB, 1, &Placement::Disk, true).unwrap()
    };
    let rates = MachineRates {
        h2d_gb_per_s: Some(20.0),
        ..rates(disk, memory)
    };
    predict(&units, &plan, &rates, &work(1))
}

#[test]
fn reading_waits_for_frames_and_copying_for_slots() {
    let unit = 100.0 * MIB as f64 * 1e-9;
    // One slot: a unit is copied and computed with before the next is copied, which is read meanwhile.
    let c = through_frames(1, 64, 10.0, 10.0);
    let (read, copy) = (21.0 * unit / 10.0, 21.0 * unit / 20.0);
    assert!(c.pass_s > (read + copy) * 0.98, "{c:?}");
    assert!(c.pass_s < (read + copy) * 1.05, "{c:?}");
    // Half a unit of frames: the disk waits for the copy, and that for computing with the unit before.
    let few = through_frames(1, 12, 10.0, 10.0);
    assert!(few.pass_s > c.pass_s * 1.05, "{few:?} {c:?}");
    // With a second slot copies have ended when a unit has: either is a bound.
    for (disk, memory) in [(10.0, 10.0), (10.0, 500.0), (100.0, 500.0)] {
        let c = through_frames(2, 64, disk, memory);
        assert!(c.pass_s >= c.bound_s * 0.999, "{c:?}");
        assert!(c.pass_s <= c.bound_s * 1.05, "{c:?}");
    }
}

#[test]
fn measured_points_are_interpolated() {
    let c = ComputeRates {
        memory_gb_per_s: 20.0,
        gflops: 400.0,
        element_bytes: 2.0,
        points: vec![(1, 0.05), (8, 0.06), (64, 0.2)],
    };
    let s = |rows| c.seconds(1_000_000_000, 2.0, rows);
    assert!((s(1) - 0.05).abs() < 1e-9 && (s(64) - 0.2).abs() < 1e-9);
    assert!((s(36) - 0.13).abs() < 1e-9, "{}", s(36));
    assert!((s(128) - 0.4).abs() < 1e-9);
    assert_eq!(s(0), 0.0);
}

#[test]
fn a_deep_queue_takes_memory_from_weights_for_kv() {
    let units = model(20);
    let r = rates(1.0, 20.0);
    // A budget of 1.5 GB, 10 MiB of KV a sequence.
    let mut at = |n: usize| {
        let left = (1500 * MIB).checked_sub(n as u64 * 10 * MIB)?;
        let plan = Plan::of_sizes(&units, left, 1, &Placement::Auto, true).ok()?;
        let cost = predict(&units, &plan, &r, &work(n));
        Some((cost, plan.resident_bytes))
    };
    let (one, _, weights) = best_concurrency(1, &mut at).unwrap();
    let (many, _, fewer) = best_concurrency(256, &mut at).unwrap();
    assert_eq!(one, 1);
    assert!(many > 64, "{many}");
    assert!(fewer < weights);
    assert!(best_concurrency(4, &mut |_| None::<(PassCost, ())>).is_none());
}
