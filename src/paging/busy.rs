//! Whether what is measured had the machine to itself.

use std::fs;

/// The kernel's counts of this process's threads, and of the machine they run on. What cannot be read counts as nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Turns {
    /// Nanoseconds that threads ran, and that they could have run but had to wait for a core.
    ran: u64,
    waited: u64,
    /// Ticks in which the machine was not idle, and those of them that its host gave to others.
    busy: u64,
    stolen: u64,
}

impl Turns {
    /// While `threads` compute. More of them than there are cores wait for one another, which says nothing of the machine: not counted.
    pub fn now(threads: usize) -> Turns {
        let mut turns = Turns::default();
        let cores = std::thread::available_parallelism().map_or(usize::MAX, usize::from);
        let tasks = match threads <= cores {
            true => fs::read_dir("/proc/self/task").ok(),
            false => None,
        };
        for task in tasks.into_iter().flatten().flatten() {
            let counts = numbers(fs::read_to_string(task.path().join("schedstat")));
            if let [ran, waited, ..] = counts[..] {
                turns.ran += ran;
                turns.waited += waited;
            }
        }
        let of_all = fs::read_to_string("/proc/stat").map(|text| {
            let first = text.lines().next().unwrap_or_default();
            first.trim_start_matches("cpu").to_string()
        });
        // user nice system idle iowait irq softirq steal
        if let [user, nice, system, _, _, irq, softirq, steal, ..] = numbers(of_all)[..] {
            turns.busy = user + nice + system + irq + softirq + steal;
            turns.stolen = steal;
        }
        turns
    }

    /// The part of the time since `before` that this process waited for a core, or its host for one of its own.
    pub fn lost_since(&self, before: &Turns) -> f64 {
        let since = |now: u64, then: u64| now.saturating_sub(then) as f64;
        let share = |part: f64, all: f64| if all > 0.0 { part / all } else { 0.0 };
        let waited = since(self.waited, before.waited);
        let waited = share(waited, since(self.ran, before.ran) + waited);
        let stolen = since(self.stolen, before.stolen);
        waited.max(share(stolen, since(self.busy, before.busy)))
    }
}

fn numbers(text: std::io::Result<String>) -> Vec<u64> {
    let words = text.unwrap_or_default();
    words
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_for_a_core_and_a_host_that_takes_it_are_lost() {
        let before = Turns {
            ran: 100,
            waited: 50,
            busy: 10,
            stolen: 4,
        };
        let after = |ran: u64, waited: u64, stolen: u64| Turns {
            ran: 100 + ran,
            waited: 50 + waited,
            busy: 10 + 100,
            stolen: 4 + stolen,
        };
        assert_eq!(after(300, 0, 0).lost_since(&before), 0.0);
        assert_eq!(after(300, 100, 0).lost_since(&before), 0.25);
        assert_eq!(after(300, 100, 40).lost_since(&before), 0.4);
        // Nothing is known of a process that did nothing, or where the kernel says nothing.
        assert_eq!(Turns::default().lost_since(&Turns::default()), 0.0);
    }

    #[test]
    fn more_threads_than_cores_wait_for_one_another() {
        let cores = std::thread::available_parallelism().unwrap().get();
        if Turns::now(1).ran == 0 {
            return println!("skipped: this kernel does not count");
        }
        let before = Turns::now(cores);
        let spin = move || {
            let started = std::time::Instant::now();
            while started.elapsed().as_millis() < 300 {
                std::hint::spin_loop();
            }
            // Counted while the threads are there.
            (Turns::now(cores), Turns::now(3 * cores))
        };
        let crowd: Vec<_> = (0..3 * cores).map(|_| std::thread::spawn(spin)).collect();
        let after: Vec<_> = crowd.into_iter().map(|t| t.join().unwrap()).collect();
        let lost = after.iter().map(|(a, _)| a.lost_since(&before));
        let lost = lost.fold(0.0, f64::max);
        assert!(lost > 0.4, "three for each core: {lost}");
        let mut own = after.iter().map(|(_, own)| own);
        assert!(own.all(|t| t.ran == 0 && t.waited == 0));
    }
}
