use super::*;

/// The bytes of the reference pictures: a linear congruence's upper bits.
fn noise(width: usize, height: usize) -> Rgb {
    let mut x = 12345u32;
    let data = (0..width * height * 3)
        .map(|_| {
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12345) & 0x7fff_ffff;
            (x >> 16) as u8
        })
        .collect();
    Rgb {
        width,
        height,
        data,
    }
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
fn the_bytes_are_those_of_pillow() {
    // FNV-1a of `Image.fromarray(noise).resize((W, H), BICUBIC)`, Pillow 13.0.
    for (w, h, to_w, to_h, want) in [
        (37, 23, 28, 28, 0xaf01_1c44_d518_11f3),
        (5, 3, 56, 28, 0x1330_ef53_6eb1_4b55),
        (100, 1, 28, 28, 0x1081_2c09_3c2b_b025),
        (64, 64, 28, 84, 0x5bad_1507_9bb4_6604),
        (61, 47, 61, 28, 0x1cec_cd00_6de4_2082),
        (61, 47, 28, 47, 0xdc20_80c2_36b8_ecf7),
        (300, 41, 56, 56, 0x745a_5cca_3cb1_9587),
        (7, 90, 140, 28, 0xa463_099c_ea47_9d9f),
        (1, 1, 28, 28, 0x9af2_e16d_459c_3315),
        (33, 29, 99, 87, 0x9f1f_996f_3390_f6c9),
    ] {
        let got = resize(&noise(w, h), to_w, to_h);
        assert_eq!((got.width, got.height), (to_w, to_h));
        assert_eq!(fnv(&got.data), want, "{w} x {h} -> {to_w} x {to_h}");
    }
}

#[test]
fn the_same_size_is_the_same_picture() {
    let image = noise(17, 5);
    assert_eq!(resize(&image, 17, 5), image);
}
