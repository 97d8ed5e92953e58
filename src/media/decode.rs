//! PNG, JPEG and WebP files → RGB bytes.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek, SeekFrom};
use std::panic::AssertUnwindSafe;
use std::path::Path;

use image::error::{ImageError, LimitErrorKind};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use crate::error::{Code, Error, Result};
use crate::units::human_bytes;

/// Most bytes of one encoded image.
pub(super) const MAX_FILE_BYTES: u64 = 256 << 20;
/// Most pixels of one decoded image: where Pillow refuses one as a decompression bomb.
const MAX_PIXELS: u64 = 178_956_970;

/// 8-bit RGB, row-major: `data` holds `height · width · 3` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb {
    pub width: usize,
    pub height: usize,
    pub data: Vec<u8>,
}

/// Reads an image file. Errors (Code::Media, or Code::Io) name it.
pub fn read_image(path: &Path) -> Result<Rgb> {
    let name = path.display().to_string();
    let bytes = read_bounded(path, &name)?;
    decode(&bytes, &name)
}

/// What an image file's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Upright.
    pub height: usize,
    pub width: usize,
    /// Host memory that reading, decoding and resizing take at most.
    pub decode_bytes: u64,
}

/// The header of an image file, of which no more is read than it takes. Errors as [`read_image`].
pub(super) fn read_head(path: &Path) -> Result<Head> {
    let name = path.display().to_string();
    let failed = |e: &std::io::Error| Error::io(format!("cannot read the image {name}"), e);
    let file_bytes = expect_image_file(path, &name)?;
    let mut file = BufReader::new(File::open(path).map_err(|e| failed(&e))?);
    let format = known_format(file.fill_buf().map_err(|e| failed(&e))?, &name)?;
    if format != ImageFormat::Jpeg {
        return head_from(file, format, file_bytes, &name);
    }
    // Its decoder reads whatever it is given to the end.
    match jpeg_header(&mut file).map_err(|e| failed(&e))? {
        Some(header) => head_from(Cursor::new(header), format, file_bytes, &name),
        None => Err(broken(&name, "it is no whole JPEG file")),
    }
}

/// As [`read_head`], of a file in memory.
pub(super) fn head(bytes: &[u8], name: &str) -> Result<Head> {
    let format = known_format(bytes, name)?;
    head_from(Cursor::new(bytes), format, bytes.len() as u64, name)
}

fn head_from(
    reader: impl BufRead + Seek,
    format: ImageFormat,
    file_bytes: u64,
    name: &str,
) -> Result<Head> {
    let found = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let (mut decoder, width, height) = decoder(reader, format)?;
        let sample = u64::from(decoder.color_type().bytes_per_pixel());
        // The decoder's own planes and the pixels it gives; then these as RGB, and once more when they are turned. A progressive JPEG's
        // coefficients are kept until its last scan. PNG alone is decoded from a stream, the others from a copy of the file.
        let (pixel_bytes, copies) = match format {
            ImageFormat::Png => (2 * sample + 6, 1),
            _ => (2 * sample + 10, 2),
        };
        let pixels = width as u64 * height as u64;
        let decode_bytes = pixels * pixel_bytes + file_bytes * copies;
        let turned = decoder.orientation()?.to_exif() > 4;
        let (height, width) = match turned {
            true => (width, height),
            false => (height, width),
        };
        Ok(Head {
            height,
            width,
            decode_bytes,
        })
    }));
    of_decoder(found, name)
}

/// A JPEG file up to where its first scan begins; `None` where it has no scan, or a header beyond all measure.
fn jpeg_header(file: &mut (impl Read + Seek)) -> std::io::Result<Option<Vec<u8>>> {
    const MAX_HEADER_BYTES: u64 = 16 << 20;
    const SCAN: u8 = 0xda;
    let mut at = 2;
    file.seek(SeekFrom::Start(at))?;
    loop {
        let mut marker = [0; 4];
        match file.read_exact(&mut marker) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let step = match marker {
            // Fill bytes, and markers that stand alone.
            [0xff, 0xff, ..] => 1,
            [0xff, 0x01 | 0xd0..=0xd8, ..] => 2,
            [0xff, kind, high, low] if kind >= 0xc0 => {
                2 + i64::from(u16::from_be_bytes([high, low]))
            }
            _ => return Ok(None),
        };
        at += step as u64;
        if marker[1] == SCAN {
            break;
        }
        if at > MAX_HEADER_BYTES {
            return Ok(None);
        }
        // Inside what is buffered, where it can: a file may be nothing but markers.
        file.seek_relative(step - marker.len() as i64)?;
    }
    let mut header = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(at).read_to_end(&mut header)?;
    Ok(Some(header))
}

/// A whole regular file of at most [`MAX_FILE_BYTES`].
pub(super) fn read_bounded(path: &Path, name: &str) -> Result<Vec<u8>> {
    expect_image_file(path, name)?;
    std::fs::read(path).map_err(|e| Error::io(format!("cannot read the image {name}"), &e))
}

/// The size of a regular file that may be an image.
fn expect_image_file(path: &Path, name: &str) -> Result<u64> {
    let failed = |e: &std::io::Error| Error::io(format!("cannot read the image {name}"), e);
    let meta = std::fs::metadata(path).map_err(|e| failed(&e))?;
    if !meta.is_file() {
        return Err(broken(name, "it is not a regular file"));
    }
    if meta.len() > MAX_FILE_BYTES {
        let cause = format!("{} is more than an image may have", human_bytes(meta.len()));
        return Err(broken(name, &cause));
    }
    Ok(meta.len())
}

/// Decodes a PNG, JPEG or WebP file in memory, upright. `name` stands for it in errors (Code::Media).
pub fn decode(bytes: &[u8], name: &str) -> Result<Rgb> {
    let format = known_format(bytes, name)?;
    of_decoder(std::panic::catch_unwind(|| decode_as(bytes, format)), name)
}

fn known_format(bytes: &[u8], name: &str) -> Result<ImageFormat> {
    match image::guess_format(bytes) {
        Ok(f @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => Ok(f),
        Ok(other) => Err(broken(
            name,
            &format!("{other:?} is none of PNG, JPEG, WebP"),
        )),
        Err(_) => Err(broken(name, "it is none of PNG, JPEG, WebP")),
    }
}

/// The decoders bound their own tables; a panic in one of them is a broken file, not the end of a batch.
fn of_decoder<T>(done: std::thread::Result<Result<T, Refused>>, name: &str) -> Result<T> {
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Refused::Image(e))) => Err(broken(name, &one_line(&e))),
        Ok(Err(Refused::Other(cause))) => Err(broken(name, &cause)),
        Err(_) => Err(broken(name, "the decoder failed on it")),
    }
}

enum Refused {
    Image(ImageError),
    Other(String),
}

impl From<ImageError> for Refused {
    fn from(e: ImageError) -> Refused {
        Refused::Image(e)
    }
}

/// A decoder that has read the header, with the width and height it says.
fn decoder<'a>(
    reader: impl BufRead + Seek + 'a,
    format: ImageFormat,
) -> Result<(impl ImageDecoder + 'a, usize, usize), Refused> {
    let mut decoder = ImageReader::with_format(reader, format).into_decoder()?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(Refused::Other(format!(
            "{width} x {height} pixels are more than the {MAX_PIXELS} this program decodes"
        )));
    }
    if width == 0 || height == 0 {
        return Err(Refused::Other("it has no pixels".into()));
    }
    let mut limits = image::Limits::default();
    // Eight bytes a pixel is the widest format there is; as much again for the decoder's own work.
    limits.max_alloc = Some(u64::from(width) * u64::from(height) * 16 + (64 << 20));
    decoder.set_limits(limits)?;
    Ok((decoder, width as usize, height as usize))
}

fn decode_as(bytes: &[u8], format: ImageFormat) -> Result<Rgb, Refused> {
    let (mut decoder, ..) = decoder(Cursor::new(bytes), format)?;
    let orientation = decoder.orientation()?;
    let decoded = DynamicImage::from_decoder(decoder)?;
    let mut upright = DynamicImage::ImageRgb8(rgb8(decoded)?);
    upright.apply_orientation(orientation);
    let (width, height) = (upright.width() as usize, upright.height() as usize);
    match upright {
        DynamicImage::ImageRgb8(b) => Ok(Rgb {
            width,
            height,
            data: b.into_raw(),
        }),
        _ => Err(Refused::Other("it changed its kind when turned".into())),
    }
}

/// To 8-bit RGB as Pillow does it: alpha is dropped, of 16 bits the high eight stay (no rounding).
fn rgb8(image: DynamicImage) -> Result<image::RgbImage, Refused> {
    let (width, height) = (image.width(), image.height());
    let high = |v: u16| (v >> 8) as u8;
    let data: Vec<u8> = match image {
        DynamicImage::ImageRgb8(b) => return Ok(b),
        DynamicImage::ImageLuma8(b) => b.as_raw().iter().flat_map(|v| [*v; 3]).collect(),
        DynamicImage::ImageLumaA8(b) => {
            b.as_raw().chunks_exact(2).flat_map(|p| [p[0]; 3]).collect()
        }
        DynamicImage::ImageRgba8(b) => b
            .as_raw()
            .chunks_exact(4)
            .flat_map(|p| [p[0], p[1], p[2]])
            .collect(),
        DynamicImage::ImageLuma16(b) => b.as_raw().iter().flat_map(|v| [high(*v); 3]).collect(),
        DynamicImage::ImageLumaA16(b) => b
            .as_raw()
            .chunks_exact(2)
            .flat_map(|p| [high(p[0]); 3])
            .collect(),
        DynamicImage::ImageRgb16(b) => b.as_raw().iter().map(|v| high(*v)).collect(),
        DynamicImage::ImageRgba16(b) => b
            .as_raw()
            .chunks_exact(4)
            .flat_map(|p| [high(p[0]), high(p[1]), high(p[2])])
            .collect(),
        _ => {
            return Err(Refused::Other(
                "its samples are neither 8 nor 16 bits".into(),
            ));
        }
    };
    image::RgbImage::from_raw(width, height, data)
        .ok_or_else(|| Refused::Other("its size and its data disagree".into()))
}

/// The error every unusable image gives.
pub(super) fn broken(name: &str, cause: &str) -> Error {
    Error::new(
        Code::Media,
        format!("cannot use the image {name}"),
        cause,
        "give a whole PNG, JPEG or WebP file",
    )
}

fn one_line(e: &ImageError) -> String {
    if let ImageError::Limits(limit) = e
        && limit.kind() == LimitErrorKind::InsufficientMemory
    {
        return "decoding it takes more memory than its size allows".into();
    }
    e.to_string().lines().next().unwrap_or_default().into()
}

#[cfg(test)]
mod tests;
