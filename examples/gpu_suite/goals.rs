//! What the project set itself for a Hopper-class card, beside what this run measured: the closing table.

use super::report::Report;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Products at few rows: share of device memory's copy rate.
    FewRows,
    /// Products at 512 to 4096 rows: share of cublasLt's rate.
    ManyRows,
    /// Copies of a pass: share of the pinned peak.
    Copies,
    /// A pass's time over the largest of disk, copies and compute.
    Pass,
    /// Error of the logits against float32, over that of transformers' own 16-bit run.
    Logits,
    /// From a slot being ready to its first kernel, µs.
    Ready,
}

struct Line {
    goal: Goal,
    what: &'static str,
    wanted: &'static str,
    /// Whether the worst value seen will do.
    holds: fn(f64) -> bool,
    /// Whether more is better: the least seen counts then, else the most.
    more: bool,
    show: fn(f64) -> String,
}

fn share(x: f64) -> String {
    format!("{:.0} %", 100.0 * x)
}

const LINES: [Line; 6] = [
    Line {
        goal: Goal::FewRows,
        what: "products at 1 to 32 rows whose floor is above a launch, of the measured copy rate of device memory",
        wanted: ">= 80 %",
        holds: |x| x >= 0.8,
        more: true,
        show: share,
    },
    Line {
        goal: Goal::ManyRows,
        what: "products at 512 to 4096 rows, of cublasLt",
        wanted: ">= 60 %",
        holds: |x| x >= 0.6,
        more: true,
        show: share,
    },
    Line {
        goal: Goal::Copies,
        what: "copies during decode, of the pinned peak",
        wanted: ">= 90 %",
        holds: |x| x >= 0.9,
        more: true,
        show: share,
    },
    Line {
        goal: Goal::Pass,
        what: "pass time over the largest of disk, copies and compute",
        wanted: "<= 1.05",
        holds: |x| x <= 1.05,
        more: false,
        show: |x| format!("{x:.2}"),
    },
    Line {
        goal: Goal::Logits,
        what: "error of the logits against float32, over transformers' own 16-bit run",
        wanted: "< 1",
        holds: |x| x < 1.0,
        more: false,
        show: |x| format!("{x:.2}"),
    },
    Line {
        goal: Goal::Ready,
        what: "from a slot being ready to its first kernel, median",
        wanted: "< 50 µs",
        holds: |x| x < 50.0,
        more: false,
        show: |x| format!("{x:.0} µs"),
    },
];

/// The worst of what was seen for each goal.
#[derive(Default)]
pub struct Goals {
    worst: [Option<f64>; LINES.len()],
    counts: [usize; LINES.len()],
}

impl Goals {
    pub fn seen(&mut self, goal: Goal, value: f64) {
        for (i, line) in LINES.iter().enumerate() {
            if line.goal == goal {
                self.counts[i] += 1;
                self.worst[i] = Some(match self.worst[i] {
                    None => value,
                    Some(w) if line.more => w.min(value),
                    Some(w) => w.max(value),
                });
            }
        }
    }

    /// Goal, what was wanted, the worst that was measured and of how many, and what that says. `timed`: times mean something.
    fn rows(&self, timed: bool) -> Vec<[String; 5]> {
        let row = |(i, line): (usize, &Line)| {
            let said = match self.worst[i] {
                None => "not run",
                Some(_) if !timed && line.goal != Goal::Logits => "not judged: a smoke run",
                Some(x) if (line.holds)(x) => "held",
                Some(_) => "NOT held",
            };
            [
                line.what.to_string(),
                line.wanted.to_string(),
                self.worst[i].map_or("-".into(), line.show),
                self.counts[i].to_string(),
                said.to_string(),
            ]
        };
        LINES.iter().enumerate().map(row).collect()
    }

    /// The table. A goal that is missed is no failed check: it was set for a Hopper-class card.
    pub fn table(&self, report: &mut Report, smoke: bool) {
        let columns = ["goal, on a Hopper-class card", "wanted", "worst", "of", ""];
        report.table("How good", &columns);
        for row in self.rows(!smoke) {
            report.row(&row.each_ref().map(String::as_str));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(goals: &Goals, goal: Goal, timed: bool) -> [String; 2] {
        let i = LINES.iter().position(|l| l.goal == goal).unwrap();
        let [_, _, worst, _, said] = goals.rows(timed).swap_remove(i);
        [worst, said]
    }

    #[test]
    fn the_worst_value_decides() {
        let mut goals = Goals::default();
        for share in [0.95, 0.81, 0.9] {
            goals.seen(Goal::FewRows, share);
        }
        assert_eq!(said(&goals, Goal::FewRows, true), ["81 %", "held"]);
        goals.seen(Goal::FewRows, 0.79);
        assert_eq!(said(&goals, Goal::FewRows, true), ["79 %", "NOT held"]);
        for ratio in [1.01, 1.06, 1.0] {
            goals.seen(Goal::Pass, ratio);
        }
        assert_eq!(said(&goals, Goal::Pass, true), ["1.06", "NOT held"]);
        goals.seen(Goal::Ready, f64::NAN);
        assert_eq!(said(&goals, Goal::Ready, true)[1], "NOT held");
    }

    #[test]
    fn what_was_not_run_is_said_and_a_smoke_run_judges_no_time() {
        let mut goals = Goals::default();
        assert_eq!(said(&goals, Goal::Copies, true), ["-", "not run"]);
        goals.seen(Goal::Copies, 0.99);
        goals.seen(Goal::Logits, 1.0);
        assert_eq!(
            said(&goals, Goal::Copies, false)[1],
            "not judged: a smoke run"
        );
        assert_eq!(said(&goals, Goal::Logits, false)[1], "NOT held");
    }
}
