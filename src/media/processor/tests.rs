use super::*;
use crate::media::{Grid, resize};
use serde_json::json;

fn processor(image: Value, video: Option<Value>) -> Result<Processor> {
    let video = video.and_then(|v| v.as_object().cloned());
    Processor::from_config(
        image.as_object().unwrap(),
        video.as_ref(),
        &VisionSpec::tiny(),
    )
}

fn plain() -> Processor {
    processor(json!({"min_pixels": 3136, "max_pixels": 12845056}), None).unwrap()
}

fn noise(width: usize, height: usize, seed: u32) -> Rgb {
    let mut x = seed;
    let data = (0..width * height * 3)
        .map(|_| {
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
            (x >> 16) as u8
        })
        .collect();
    Rgb {
        width,
        height,
        data,
    }
}

#[test]
fn sizes_are_those_of_the_reference() {
    // FNV-1a over (height, width), u32 little-endian, of transformers 5.17's `smart_resize`; (0, 0) where it raises.
    let mut x = 777u32;
    let mut next = || {
        x = x.wrapping_mul(1_103_515_245).wrapping_add(12345) & 0x7fff_ffff;
        (x >> 8) as usize % 3000 + 1
    };
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for _ in 0..3000 {
        let (h, w) = (next(), next());
        for (min, max) in [(3136, 12845056), (100352, 602112), (3136, 50000)] {
            let (h, w) = smart_resize(h, w, 28, min, max).unwrap_or((0, 0));
            for b in [h, w].iter().flat_map(|n| (*n as u32).to_le_bytes()) {
                hash = (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    assert_eq!(hash, 0x546c_f0ba_d0b9_a5e6);
}

#[test]
fn halves_are_rounded_to_even() {
    // 42/28 = 1.5 → 2, 70/28 = 2.5 → 2.
    assert_eq!(smart_resize(42, 70, 28, 1, 1 << 20), Some((56, 56)));
    assert_eq!(smart_resize(1, 201, 28, 1, 1 << 20), None);
    assert_eq!(smart_resize(1, 200, 28, 1, 1 << 20), Some((28, 28)));
}

/// Patch rows written out from the definition: (gh/m, gw/m, m, m, C, T, p, p).
#[test]
fn patches_come_in_the_models_order() {
    let p = plain();
    let image = noise(90, 60, 5);
    let v = p.image(&image, "x", &Options::default()).unwrap();
    assert_eq!(v.grid, Grid { t: 1, h: 4, w: 6 });
    assert_eq!((v.tokens(), v.patch_len()), (6, 1176));
    let small = resize(&image, 84, 56);
    let mut all = vec![0.0; 24 * 1176];
    v.write_patches(0, &mut all);
    let mut at = 0;
    for (cell_y, cell_x) in (0..2).flat_map(|y| (0..3).map(move |x| (y, x))) {
        for (my, mx) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            for c in 0..3 {
                for (_, y, x) in
                    (0..2).flat_map(|t| (0..14).flat_map(move |y| (0..14).map(move |x| (t, y, x))))
                {
                    let (row, col) = ((cell_y * 2 + my) * 14 + y, (cell_x * 2 + mx) * 14 + x);
                    let byte = small.data[(row * 84 + col) * 3 + c];
                    assert_eq!(all[at], p.normalize.table(c)[byte as usize]);
                    at += 1;
                }
            }
        }
    }
    let mut part = vec![0.0; 3 * 1176];
    v.write_patches(7, &mut part);
    assert_eq!(part, all[7 * 1176..10 * 1176]);
}

#[test]
fn an_odd_number_of_frames_repeats_the_last() {
    let p = plain();
    let frames: Vec<Rgb> = (0..3).map(|i| noise(56, 56, i)).collect();
    let options = Options {
        min_pixels: Some(3136),
        clock: Clock::Exact,
        ..Options::default()
    };
    let make = |list: &[usize]| {
        let mut it = list.iter().map(|i| Ok(frames[*i].clone()));
        p.frames(list.len(), &mut it, 4.0, &options).unwrap()
    };
    let (odd, even) = (make(&[0, 1, 2]), make(&[0, 1, 2, 2]));
    assert_eq!(odd.grid.t, 2);
    assert_eq!(
        odd.kind,
        Kind::Video {
            seconds_per_grid: 0.5
        }
    );
    let patches = |v: &Visual| {
        let mut out = vec![0.0; v.grid.patches() * v.patch_len()];
        v.write_patches(0, &mut out);
        out
    };
    assert_eq!(patches(&odd), patches(&even));
    assert_ne!(odd.content_hash(), make(&[0, 1, 1]).content_hash());
    assert_eq!(odd.content_hash(), make(&[0, 1, 2]).content_hash());
}

#[test]
fn a_long_video_gets_an_even_share_of_the_pixels() {
    let p = plain();
    let frame = noise(1400, 1000, 3);
    let grid = |n: usize| {
        let mut it = std::iter::repeat_n(frame.clone(), 1).map(Ok);
        p.frames(n, &mut it, 2.0, &Options::default()).unwrap().grid
    };
    // Few: 768 cells of 28 × 28 a frame. 600: 115200 · 2 / 600 = 384. Never below 1.05 times the minimum of 128.
    assert!(grid(8).slice() / 4 <= 768 && grid(8).slice() / 4 > 700);
    assert!(grid(600).slice() / 4 <= 384 && grid(600).slice() / 4 > 350);
    assert!(grid(100_000).slice() / 4 <= 134);
}

#[test]
fn listed_frames_are_used_as_they_are_unless_too_many() {
    let p = plain();
    let dir = tempfile::tempdir().unwrap();
    for i in 0..7u8 {
        let path = dir.path().join(format!("{i}.png"));
        image::RgbImage::from_pixel(56, 56, image::Rgb([i * 10, 0, 0]))
            .save(path)
            .unwrap();
    }
    std::fs::write(dir.path().join("notes.txt"), "no frame").unwrap();
    let ask = |options: Options| MediaRequest::Video {
        at: dir.path().display().to_string(),
        options,
    };
    let tools = VideoTools::default();
    let load = |o| p.load_request(&ask(o), Path::new("/"), &tools).unwrap();
    let all = load(Options::default());
    assert_eq!(
        (all.frames(), all.kind),
        (
            7,
            Kind::Video {
                seconds_per_grid: 1.0
            }
        )
    );
    let some = load(Options {
        max_frames: Some(4),
        fps: Some(7.0),
        clock: Clock::Exact,
        ..Options::default()
    });
    assert_eq!(
        (some.frames(), some.kind),
        (
            4,
            Kind::Video {
                seconds_per_grid: 0.5
            }
        )
    );
}

#[test]
fn configs_of_all_ages_are_read() {
    let new = json!({"size": {"shortest_edge": 3136, "longest_edge": 50176}, "patch_size": 14});
    let p = processor(
        new,
        Some(json!({"size": {"shortest_edge": 1000, "longest_edge": 2000}})),
    );
    let p = p.unwrap();
    assert_eq!((p.min_pixels, p.max_pixels), (3136, 50176));
    assert_eq!((p.video.min_pixels, p.video.max_pixels), (1000, 2000));
    // Where both are written the older name wins, as in the reference.
    let both = json!({"min_pixels": 5000, "size": {"shortest_edge": 3136, "longest_edge": 50176}});
    assert_eq!(processor(both, None).unwrap().min_pixels, 5000);
    assert_eq!(plain().video.max_pixels, 768 * 784);
    for bad in [
        json!({"patch_size": 16}),
        json!({"do_resize": false}),
        json!({"resample": 2}),
        json!({"min_pixels": 10, "max_pixels": 5}),
        json!({"max_pixels": 1e15}),
        json!({"min_pixels": "many"}),
        json!({"image_std": [1, 0, 1]}),
        json!({"image_mean": [0.5]}),
    ] {
        assert_eq!(
            processor(bad.clone(), None).unwrap_err().code(),
            Code::Config,
            "{bad}"
        );
    }
}

#[test]
fn a_model_without_the_file_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let e = Processor::load(dir.path(), &VisionSpec::tiny()).unwrap_err();
    assert!(e.what().contains("preprocessor_config.json"), "{e}");
    let nested = json!({"image_processor": {"min_pixels": 3136, "max_pixels": 6272}, "video_processor": {"max_frames": 9}});
    std::fs::write(dir.path().join("processor_config.json"), nested.to_string()).unwrap();
    let p = Processor::load(dir.path(), &VisionSpec::tiny()).unwrap();
    assert_eq!((p.max_pixels, p.video.max_frames), (6272, 9));
}
