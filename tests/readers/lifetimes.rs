//! Memory the kernel may write to is neither freed nor lent again, whatever is dropped first.

use std::time::Duration;

use tensorpager::io::Faults;

use crate::bed::{Bed, KINDS, PATIENCE, disk, file, none};

/// After a drop in the middle of things every frame is back, and nobody writes to the memory any more.
#[test]
fn a_drop_takes_the_reads_in_flight_down_first() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 16 << 20);
    let delay_by = Duration::from_millis(1);
    let wild = Faults {
        seed: 11,
        lose: 0.3,
        delay: 0.5,
        delay_by,
        reorder: true,
        ..none()
    };
    for kind in KINDS {
        for faults in [None, Some(wild)] {
            let paths = std::slice::from_ref(&path);
            let Some(mut bed) = Bed::new(kind, faults, paths, content.len() as u64, 64) else {
                continue;
            };
            for at in (0..content.len()).step_by(1 << 18) {
                bed.send(0, at as u64, 1 << 18, 1 << 18, at as u64);
            }
            let mut out = Vec::with_capacity(64);
            // One is there, so the others are under way.
            bed.flights.reap(PATIENCE, &mut out).unwrap();
            let Bed {
                flights,
                mut region,
                ..
            } = bed;
            drop(out);
            drop(flights);
            assert_eq!(region.lent(), 0, "{kind}");
            region.bytes_mut().fill(0x77);
            std::thread::sleep(Duration::from_millis(20));
            assert!(
                region.bytes().iter().all(|&b| b == 0x77),
                "{kind}: written to after the drop"
            );
        }
    }
}

#[test]
fn memory_may_be_let_go_of_before_the_reads_are_over() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 4 << 20);
    for kind in KINDS {
        let paths = std::slice::from_ref(&path);
        let Some(mut bed) = Bed::new(kind, None, paths, content.len() as u64, 16) else {
            continue;
        };
        for at in (0..content.len()).step_by(1 << 18) {
            bed.send(0, at as u64, 1 << 18, 1 << 18, at as u64);
        }
        let Bed {
            mut flights,
            region,
            mut out,
            ..
        } = bed;
        drop(region);
        while flights.in_flight() > 0 {
            flights.reap(PATIENCE, &mut out).unwrap();
        }
        drop(flights);
        assert_eq!(out.len(), 16);
        for op in &out {
            assert!(
                op.frame[..] == content[op.tag as usize..][..1 << 18],
                "{kind}"
            );
        }
    }
}
