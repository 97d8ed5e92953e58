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
fn the_ring_is_bounded_unless_frames_are_asked_for_and_never_longer_than_of_use() {
    let units: Vec<UnitSize> = model(28, 5).iter().map(UnitSize::of).collect();
    let ring = |page_mib: u64, count| {
        let frames = Frames {
            page_bytes: page_mib << 20,
            count,
        };
        Ring::new(&units[1..], frames)
    };
    assert_eq!(ring(4, None).frames, 52, "two units of 25 pages, and two");
    assert_eq!(ring(1, None).frames, 202);
    let small = Frames {
        page_bytes: 64 << 10,
        count: None,
    };
    assert_eq!(Ring::new(&units[1..], small).bytes(), 3_202 * (64 << 10));
    assert!(Ring::new(&units, small).bytes() <= RING_BYTES);
    assert_eq!(ring(16, Some(9)).bytes(), 144 << 20);
    assert_eq!(ring(16, Some(1)).frames, 2);
    assert_eq!(ring(16, Some(1000)).frames, 16);
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
