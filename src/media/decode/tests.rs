use super::*;
use image::{DynamicImage, ExtendedColorType, ImageEncoder};

/// Encodes raw samples as PNG.
fn png(
    data: &[u8],
    width: u32,
    height: u32,
    color: ExtendedColorType,
    exif: Option<u8>,
) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut out);
    if let Some(turn) = exif {
        encoder.set_exif_metadata(orientation(turn)).unwrap();
    }
    encoder.write_image(data, width, height, color).unwrap();
    out
}

/// A TIFF block with the orientation tag alone.
fn orientation(value: u8) -> Vec<u8> {
    let mut tiff = b"MM\0*\0\0\0\x08\0\x01".to_vec();
    tiff.extend([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, value, 0, 0, 0, 0, 0, 0]);
    tiff
}

fn pixels(bytes: &[u8]) -> Vec<u8> {
    decode(bytes, "test").unwrap().data
}

#[test]
fn every_kind_of_sample_becomes_rgb() {
    use ExtendedColorType::*;
    let be = |v: &[u16]| -> Vec<u8> { v.iter().flat_map(|v| v.to_ne_bytes()).collect() };
    for (data, color, want) in [
        (vec![1, 2, 3, 4, 5, 6], Rgb8, vec![1, 2, 3, 4, 5, 6]),
        (vec![7, 200], L8, vec![7, 7, 7, 200, 200, 200]),
        (vec![7, 0, 200, 255], La8, vec![7, 7, 7, 200, 200, 200]),
        (
            vec![1, 2, 3, 0, 4, 5, 6, 255],
            Rgba8,
            vec![1, 2, 3, 4, 5, 6],
        ),
        // The high byte, not the nearest: 0x01ff is 1.
        (be(&[0x01ff, 0xfe00]), L16, vec![1, 1, 1, 254, 254, 254]),
        (
            be(&[0x01ff, 9, 0xfe00, 9]),
            La16,
            vec![1, 1, 1, 254, 254, 254],
        ),
        (
            be(&[0x01ff, 0x0280, 0x0300, 0, 0, 0xffff]),
            Rgb16,
            vec![1, 2, 3, 0, 0, 255],
        ),
        (
            be(&[0x01ff, 0x0280, 0x0300, 5, 0, 0, 0xffff, 5]),
            Rgba16,
            vec![1, 2, 3, 0, 0, 255],
        ),
    ] {
        assert_eq!(pixels(&png(&data, 2, 1, color, None)), want, "{color:?}");
    }
}

#[test]
fn pictures_are_turned_upright() {
    // 2 x 1: red byte 10 left, 20 right.
    let data = [10, 0, 0, 20, 0, 0];
    for (turn, size, first) in [
        (1, (2, 1), 10),
        (2, (2, 1), 20),
        (3, (2, 1), 20),
        (6, (1, 2), 10),
        (8, (1, 2), 20),
    ] {
        let bytes = png(&data, 2, 1, ExtendedColorType::Rgb8, Some(turn));
        let got = decode(&bytes, "test").unwrap();
        assert_eq!((got.width, got.height), size, "orientation {turn}");
        let head = super::head(&bytes, "test").unwrap();
        assert_eq!((head.width, head.height), size);
        assert_eq!(got.data[0], first, "orientation {turn}");
    }
}

/// The first quarter of the first row is dark, all else is light.
fn corner() -> image::RgbImage {
    let light = |x, y| if x < 16 && y < 16 { 20 } else { 220 };
    image::RgbImage::from_fn(64, 32, |x, y| image::Rgb([light(x, y); 3]))
}

#[test]
fn jpeg_and_webp_are_turned_upright_too() {
    let picture = corner();
    let jpeg = |turn| {
        let mut out = Vec::new();
        let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 95);
        encoder.set_exif_metadata(orientation(turn)).unwrap();
        encoder
            .write_image(picture.as_raw(), 64, 32, ExtendedColorType::Rgb8)
            .unwrap();
        out
    };
    let webp = |turn| {
        let mut out = Vec::new();
        let mut encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut out);
        encoder.set_exif_metadata(orientation(turn)).unwrap();
        encoder
            .write_image(picture.as_raw(), 64, 32, ExtendedColorType::Rgb8)
            .unwrap();
        out
    };
    let dir = tempfile::tempdir().unwrap();
    // Where the dark corner lies: right, lower.
    for (turn, right, lower) in [
        (1, false, false),
        (2, true, false),
        (3, true, true),
        (4, false, true),
        (5, false, false),
        (6, true, false),
        (7, true, true),
        (8, false, true),
    ] {
        for (name, bytes) in [("jpg", jpeg(turn)), ("webp", webp(turn))] {
            let got = decode(&bytes, "test").unwrap();
            let size = if turn > 4 { (32, 64) } else { (64, 32) };
            assert_eq!((got.width, got.height), size, "{name} {turn}");
            let x = if right { got.width - 4 } else { 4 };
            let y = if lower { got.height - 4 } else { 4 };
            let dark = |x: usize, y: usize| got.data[(y * got.width + x) * 3] < 60;
            assert!(dark(x, y), "{name} {turn}");
            assert!(!dark(got.width - 1 - x, y) && !dark(x, got.height - 1 - y));
            // From the file's beginning alone.
            let path = dir.path().join(format!("{turn}.{name}"));
            std::fs::write(&path, &bytes).unwrap();
            let head = read_head(&path).unwrap();
            assert_eq!((head.width, head.height), size, "{name} {turn}");
            assert_eq!(head, super::head(&bytes, "test").unwrap());
        }
    }
}

#[test]
fn a_jpeg_header_is_read_up_to_its_scan() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jpg");
    let mut whole = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut whole)
        .write_image(corner().as_raw(), 64, 32, ExtendedColorType::Rgb8)
        .unwrap();
    // A long comment and fill bytes before it.
    let comment = [&[0xff, 0xff, 0xff, 0xfe, 0xff, 0xff][..], &[b'x'; 0xfffd]].concat();
    let long = [&whole[..2], &comment, &comment, &whole[2..]].concat();
    std::fs::write(&path, &long).unwrap();
    let head = read_head(&path).unwrap();
    assert_eq!((head.width, head.height), (64, 32));
    let scan = whole.windows(2).position(|w| w == [0xff, 0xda]).unwrap();
    let header = jpeg_header(&mut Cursor::new(&long)).unwrap().unwrap();
    assert!(
        header.len() < 2 * comment.len() + scan + 40,
        "{}",
        header.len()
    );
    for cut in [3, 20, 70_000, long.len() - (whole.len() - scan)] {
        std::fs::write(&path, &long[..cut]).unwrap();
        assert_eq!(read_head(&path).unwrap_err().code(), Code::Media, "{cut}");
    }
}

#[test]
fn a_jpeg_of_nothing_but_markers_is_looked_through_at_once() {
    // Fill bytes, and markers that stand alone: some millions of steps.
    for marker in [&[0xff][..], &[0xff, 0xd0]] {
        let bytes = [&[0xff, 0xd8][..], &marker.repeat(4_000_000 / marker.len())].concat();
        let mut file = std::io::BufReader::new(Cursor::new(&bytes));
        let started = std::time::Instant::now();
        assert!(jpeg_header(&mut file).unwrap().is_none());
        let took = started.elapsed();
        assert!(took < std::time::Duration::from_millis(500), "{took:?}");
    }
}

#[test]
fn jpeg_and_webp_are_read() {
    let image = image::RgbImage::from_pixel(16, 8, image::Rgb([200, 100, 50]));
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 100)
        .write_image(image.as_raw(), 16, 8, ExtendedColorType::Rgb8)
        .unwrap();
    let mut webp = Vec::new();
    image::codecs::webp::WebPEncoder::new_lossless(&mut webp)
        .write_image(image.as_raw(), 16, 8, ExtendedColorType::Rgb8)
        .unwrap();
    assert_eq!(pixels(&webp), *image.as_raw());
    for (got, want) in pixels(&jpeg).iter().zip(image.as_raw()) {
        assert!(got.abs_diff(*want) <= 2, "{got} for {want}");
    }
    drop(DynamicImage::ImageRgb8(image));
}

// hazard: images: one error; names the image
#[test]
fn broken_files_are_one_clear_error() {
    let good = png(&[9; 300], 10, 10, ExtendedColorType::Rgb8, None);
    let mut cases: Vec<Vec<u8>> = (0..good.len() - 12)
        .step_by(7)
        .map(|n| good[..n].to_vec())
        .collect();
    cases.push(b"GIF89a\x01\0\x01\0\0\0\0;".to_vec());
    cases.push(b"<svg/>".to_vec());
    // A header that promises 2^31 x 2^31 pixels.
    let mut bomb = good.clone();
    bomb[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    cases.push(bomb);
    for bytes in cases {
        let e = decode(&bytes, "x.png").unwrap_err();
        assert_eq!(e.code(), Code::Media);
        assert!(e.what().contains("x.png") && !e.cause().is_empty() && !e.cause().contains('\n'));
    }
}

#[test]
fn only_regular_files_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read_image(dir.path()).unwrap_err().code(), Code::Media);
    let e = read_image(&dir.path().join("none.png")).unwrap_err();
    assert!(e.what().contains("none.png"), "{e}");
}
