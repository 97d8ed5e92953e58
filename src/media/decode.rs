//! PNG, JPEG and WebP files → RGB bytes.

use std::io::Cursor;
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

/// Height and width of an image file, upright, without decoding its pixels. Errors as [`read_image`].
pub(super) fn read_size(path: &Path) -> Result<(usize, usize)> {
    let name = path.display().to_string();
    size(&read_bounded(path, &name)?, &name)
}

/// As [`read_size`], of a file in memory.
pub(super) fn size(bytes: &[u8], name: &str) -> Result<(usize, usize)> {
    let format = known_format(bytes, name)?;
    let found = std::panic::catch_unwind(|| {
        let (mut decoder, width, height) = decoder(bytes, format)?;
        let turned = decoder.orientation()?.to_exif() > 4;
        Ok(if turned {
            (width, height)
        } else {
            (height, width)
        })
    });
    of_decoder(found, name)
}

/// A whole regular file of at most [`MAX_FILE_BYTES`].
pub(super) fn read_bounded(path: &Path, name: &str) -> Result<Vec<u8>> {
    let failed = |e: &std::io::Error| Error::io(format!("cannot read the image {name}"), e);
    let meta = std::fs::metadata(path).map_err(|e| failed(&e))?;
    if !meta.is_file() {
        return Err(broken(name, "it is not a regular file"));
    }
    if meta.len() > MAX_FILE_BYTES {
        let cause = format!("{} is more than an image may have", human_bytes(meta.len()));
        return Err(broken(name, &cause));
    }
    std::fs::read(path).map_err(|e| failed(&e))
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
fn decoder(
    bytes: &[u8],
    format: ImageFormat,
) -> Result<(impl ImageDecoder + '_, usize, usize), Refused> {
    let mut decoder = ImageReader::with_format(Cursor::new(bytes), format).into_decoder()?;
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
    let (mut decoder, ..) = decoder(bytes, format)?;
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
