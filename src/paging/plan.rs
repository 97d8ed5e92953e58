//! Which units rest in host memory and which come from disk each pass, under a budget.
//!
//! A dense model is a cyclic scan: evicting by recency hits nothing, a fixed resident set hits exactly its share. The
//! set is spread between the streamed units, so that the disk works while resident units compute and two slots suffice.

use super::slot::SlotLayout;
use crate::error::{Code, Error, Result};
use crate::spec::UnitKind;
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, UnitId, align_up, flag_size, human_bytes};

/// Where a unit rests between passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Host memory, loaded once.
    Cpu,
    /// Disk: streamed every pass (or gathered row by row, for the embedding).
    Disk,
}

/// What the user asked of the placement.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Placement {
    /// As many units resident as the budget holds.
    #[default]
    Auto,
    /// Every unit in host memory.
    Cpu,
    /// Nothing resident but the final norm.
    Disk,
    /// A tier for each unit, from a device map file.
    Units(Vec<Tier>),
}

/// Embedding blocks fetched at once.
pub const GATHER_BLOCKS: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// By unit id.
    pub tiers: Vec<Tier>,
    /// Units that may run ahead of the one computing.
    pub depth: usize,
    pub slots: usize,
    pub slot_bytes: u64,
    /// Weights that stay in host memory.
    pub resident_bytes: u64,
    /// Bytes from disk each decoder pass (embedding rows apart).
    pub streamed_bytes: u64,
    pub gather_bytes: u64,
    /// Which units its passes walk through.
    pub walk: Walk,
}

/// What a pass is: through the decoder, or through the vision tower, which never meet in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    Decoder,
    Vision,
}

impl Walk {
    pub fn streams(self, kind: UnitKind) -> bool {
        match self {
            Walk::Decoder => is_streamed(kind),
            Walk::Vision => is_vision(kind),
        }
    }
}

impl Plan {
    /// The vision tower, all of it from disk: slots for one unit and `depth` ahead of it.
    pub fn vision(layouts: &[SlotLayout], depth: usize) -> Plan {
        let tower = || layouts.iter().filter(|l| is_vision(l.kind));
        let slots = (depth + 1).min(tower().count());
        Plan {
            tiers: vec![Tier::Disk; layouts.len()],
            depth: slots.saturating_sub(1),
            slots,
            slot_bytes: tower().map(|l| l.slot_bytes).max().unwrap_or(0),
            resident_bytes: 0,
            streamed_bytes: tower().map(|l| l.read_bytes).sum(),
            gather_bytes: 0,
            walk: Walk::Vision,
        }
    }

    /// Host memory the pager takes: slots, residents, room for embedding rows.
    pub fn arena_bytes(&self) -> u64 {
        self.slots as u64 * self.slot_bytes + self.resident_bytes + self.gather_bytes
    }

    /// `budget`: bytes the pager may take. `embed_in_head`: rows of a resident tied head serve as embedding rows.
    pub fn new(
        layouts: &[SlotLayout],
        budget: u64,
        depth: usize,
        placement: &Placement,
        tied_head: bool,
    ) -> Result<Plan> {
        let all = Plan::with_tiers(layouts, everything(layouts, tied_head), depth, tied_head);
        let none = Plan::with_tiers(layouts, nothing(layouts), depth, tied_head);
        let refuse = |wanted: &Plan, what: &str| {
            Error::new(
                Code::Memory,
                format!("{what} does not fit in the memory given"),
                format!(
                    "it takes {} for weights and slots; the budget leaves {}",
                    human_bytes(wanted.arena_bytes()),
                    human_bytes(budget)
                ),
                format!(
                    "give --cpu-memory at least {} more",
                    flag_size(wanted.arena_bytes().saturating_sub(budget))
                ),
            )
        };
        let plan = match placement {
            Placement::Cpu => all,
            Placement::Disk => none,
            Placement::Units(tiers) => Plan::with_tiers(layouts, tiers.clone(), depth, tied_head),
            Placement::Auto if all.arena_bytes() <= budget => all,
            Placement::Auto => largest_spread(layouts, budget, depth, tied_head).unwrap_or(none),
        };
        if plan.arena_bytes() > budget {
            let what = match placement {
                Placement::Auto | Placement::Disk => {
                    format!("even the smallest plan ({} slots)", plan.slots)
                }
                _ => "the placement asked for".to_string(),
            };
            return Err(refuse(&plan, &what));
        }
        Ok(plan)
    }

    fn with_tiers(layouts: &[SlotLayout], tiers: Vec<Tier>, depth: usize, tied_head: bool) -> Plan {
        // A decoder's passes never touch the tower, wherever a device map puts it.
        let mut tiers = tiers;
        for (tier, _) in tiers
            .iter_mut()
            .zip(layouts)
            .filter(|(_, l)| is_vision(l.kind))
        {
            *tier = Tier::Disk;
        }
        let mut resident_bytes = 0;
        let mut streamed_bytes = 0;
        let mut slot_bytes = 0;
        let mut streamed = 0usize;
        for (l, tier) in layouts.iter().zip(&tiers) {
            match tier {
                Tier::Cpu => resident_bytes += align_up(l.slot_bytes, ALIGN_BYTES),
                Tier::Disk if is_streamed(l.kind) => {
                    slot_bytes = slot_bytes.max(l.slot_bytes);
                    streamed_bytes += l.read_bytes;
                    streamed += 1;
                }
                Tier::Disk => {}
            }
        }
        let slots = (depth + 1).min(streamed);
        let gathers = layouts.iter().zip(&tiers).any(|(l, t)| match l.kind {
            UnitKind::Embed => *t == Tier::Disk && !tied_head,
            UnitKind::Head(_) => *t == Tier::Disk && tied_head,
            _ => false,
        });
        Plan {
            tiers,
            depth: slots.saturating_sub(1),
            slots,
            slot_bytes,
            resident_bytes,
            streamed_bytes,
            gather_bytes: if gathers {
                GATHER_BLOCKS as u64 * BLOCK_BYTES
            } else {
                0
            },
            walk: Walk::Decoder,
        }
    }

    pub fn is_resident(&self, unit: UnitId) -> bool {
        self.tiers[unit.index()] == Tier::Cpu
    }
}

/// Units a decoder pass walks through. The embedding is gathered; the vision tower has passes of its own.
pub fn is_streamed(kind: UnitKind) -> bool {
    matches!(kind, UnitKind::Layer(_) | UnitKind::Head(_))
}

fn is_vision(kind: UnitKind) -> bool {
    matches!(
        kind,
        UnitKind::VisionEmbed | UnitKind::VisionBlock(_) | UnitKind::VisionMerger
    )
}

fn everything(layouts: &[SlotLayout], tied_head: bool) -> Vec<Tier> {
    layouts
        .iter()
        .map(|l| match l.kind {
            // A resident tied head already holds every row.
            UnitKind::Embed if tied_head => Tier::Disk,
            UnitKind::VisionEmbed | UnitKind::VisionBlock(_) | UnitKind::VisionMerger => Tier::Disk,
            _ => Tier::Cpu,
        })
        .collect()
}

fn nothing(layouts: &[SlotLayout]) -> Vec<Tier> {
    layouts
        .iter()
        .map(|l| match l.kind {
            UnitKind::Norm => Tier::Cpu,
            _ => Tier::Disk,
        })
        .collect()
}

/// The largest number of resident units that fits, evenly spread over the pass.
fn largest_spread(
    layouts: &[SlotLayout],
    budget: u64,
    depth: usize,
    tied_head: bool,
) -> Option<Plan> {
    let pass: Vec<usize> = (0..layouts.len())
        .filter(|i| is_streamed(layouts[*i].kind))
        .collect();
    let n = pass.len();
    let spread = |k: usize| {
        let mut tiers = nothing(layouts);
        for (i, unit) in pass.iter().enumerate() {
            if (i + 1) * k / n > i * k / n {
                tiers[*unit] = Tier::Cpu;
            }
        }
        Plan::with_tiers(layouts, tiers, depth, tied_head)
    };
    // Sizes differ between layers and head blocks, so fitting is only nearly monotone in k: look from the top.
    (0..n).rev().map(spread).find(|p| p.arena_bytes() <= budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(kind: UnitKind, bytes: u64) -> SlotLayout {
        SlotLayout {
            kind,
            reads: vec![],
            weights: vec![],
            slot_bytes: bytes,
            read_bytes: bytes,
        }
    }

    fn model(layers: u32, heads: u32) -> Vec<SlotLayout> {
        let mut v = vec![layout(UnitKind::Embed, 400 << 20)];
        v.extend((0..layers).map(|i| layout(UnitKind::Layer(i), 100 << 20)));
        v.push(layout(UnitKind::Norm, 4096));
        v.extend((0..heads).map(|i| layout(UnitKind::Head(i), 90 << 20)));
        v
    }

    #[test]
    fn the_budget_is_kept_and_more_of_it_streams_less() {
        let m = model(28, 5);
        let mut last = u64::MAX;
        for mib in (210..4000).step_by(37) {
            let p = Plan::new(&m, mib << 20, 1, &Placement::Auto, true).unwrap();
            assert!(p.arena_bytes() <= mib << 20);
            assert!(
                p.streamed_bytes <= last,
                "more memory must never stream more"
            );
            last = p.streamed_bytes;
        }
        assert_eq!(last, 0);
    }

    #[test]
    fn too_little_is_refused_with_the_budget_that_would_do() {
        let m = model(28, 5);
        let e = Plan::new(&m, 100 << 20, 1, &Placement::Auto, true).unwrap_err();
        assert_eq!(e.code(), Code::Memory);
        let missing: u64 = crate::units::parse_size(
            e.fix()
                .split_whitespace()
                .find(|w| w.ends_with("MiB"))
                .unwrap(),
        )
        .unwrap();
        assert!(Plan::new(&m, (100 << 20) + missing, 1, &Placement::Auto, true).is_ok());
    }

    #[test]
    fn residents_are_spread_between_streamed_units() {
        let m = model(28, 5);
        let p = Plan::new(&m, 1900 << 20, 1, &Placement::Auto, true).unwrap();
        let pass: Vec<Tier> = (0..m.len())
            .filter(|i| is_streamed(m[*i].kind))
            .map(|i| p.tiers[i])
            .collect();
        let run = pass
            .split(|t| *t == Tier::Disk)
            .map(<[Tier]>::len)
            .max()
            .unwrap();
        assert!(run <= 2, "{pass:?}");
    }
}
