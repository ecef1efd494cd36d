//! 8-bit pictures, and the files that they become.

use std::borrow::Cow;

use ella_model::ModelError;
use tch::{Device, Kind, Tensor};

/// Where a PNG says how it was made: the name that other programs look for.
const PARAMETERS: &str = "parameters";

/// 8-bit RGB, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// `3 · width · height` bytes.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// An empty sheet.
    pub fn white(width: u32, height: u32) -> Self {
        Self { width, height, rgb: vec![255; 3 * width as usize * height as usize] }
    }

    /// Lays another picture on this one, its left top corner at (x, y); what is outside is left out.
    pub fn paste(&mut self, other: &Picture, (x, y): (u32, u32)) {
        let wide = 3 * other.width.min(self.width.saturating_sub(x)) as usize;
        if wide == 0 {
            return;
        }
        for row in 0..other.height.min(self.height.saturating_sub(y)) {
            let from = 3 * row as usize * other.width as usize;
            let to = 3 * ((y + row) as usize * self.width as usize + x as usize);
            self.rgb[to..to + wide].copy_from_slice(&other.rgb[from..from + wide]);
        }
    }

    /// A PNG that says how it was made. Equal pictures made in the same way have equal bytes.
    ///
    /// # Errors
    /// The picture has no pixels, or more bytes than it should.
    pub fn png(&self, parameters: &str) -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        // A plain text chunk holds Latin-1; readers of such parameters look there first.
        let text: Cow<'_, str> = parameters.replace('\0', " ").into();
        if text.chars().all(|c| u32::from(c) < 256) {
            encoder.add_text_chunk(PARAMETERS.into(), text.into_owned())?;
        } else {
            encoder.add_itxt_chunk(PARAMETERS.into(), text.into_owned())?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        Ok(bytes)
    }
}

/// `[b, 3, H, W]` in −1…1 to 8-bit pictures.
pub(super) fn pictures(images: &Tensor) -> Result<Vec<Picture>, ModelError> {
    let (b, _, h, w) = images.size4()?;
    let bytes = images.f_to_kind(Kind::Float)?.f_add_scalar(1.0)?.f_mul_scalar(127.5)?.f_round()?.f_to_kind(Kind::Uint8)?;
    let bytes = bytes.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_to_device(Device::Cpu)?; // [b, H, W, 3]
    let one = |index: i64| -> Result<Picture, ModelError> {
        let row = bytes.f_get(index)?;
        let mut rgb = vec![0u8; row.numel()];
        let len = rgb.len();
        row.f_copy_data(&mut rgb, len)?;
        Ok(Picture { width: w as u32, height: h as u32, rgb })
    };
    (0..b).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(value: u8) -> Picture {
        Picture { width: 4, height: 3, rgb: vec![value; 36] }
    }

    #[test]
    fn a_picture_and_how_it_was_made_read_back_from_its_file() {
        for parameters in ["a café\nSeed: 7", "漢字 “quoted”"] {
            let file = plain(200).png(parameters).unwrap();
            let read = image::load_from_memory(&file).unwrap().into_rgb8();
            assert_eq!((read.width(), read.height(), read.into_raw()), (4, 3, plain(200).rgb));
            let reader = png::Decoder::new(std::io::Cursor::new(&file)).read_info().unwrap();
            let (latin, wide) = (&reader.info().uncompressed_latin1_text, &reader.info().utf8_text);
            let text = latin.first().map(|chunk| chunk.text.clone()).or_else(|| wide.first().map(|chunk| chunk.get_text().unwrap()));
            assert_eq!(text.unwrap(), parameters);
        }
        assert!(Picture::white(0, 0).png("").is_err());
    }

    #[test]
    fn what_lies_outside_is_left_out() {
        let mut sheet = Picture::white(6, 4);
        sheet.paste(&plain(7), (4, 2));
        sheet.paste(&plain(9), (6, 4));
        sheet.paste(&plain(9), (60, 0));
        assert_eq!(sheet.rgb.iter().filter(|&&byte| byte == 7).count(), 3 * 2 * 2);
        assert_eq!(sheet.rgb.iter().filter(|&&byte| byte == 255).count(), 3 * (24 - 4));
    }

    #[test]
    fn numbers_become_bytes_as_diffusers_rounds_them() {
        let image = Tensor::from_slice(&[-1.0f32, 0.0, 1.0, 0.5, -0.25, 0.999]).reshape([1, 3, 1, 2]);
        assert_eq!(pictures(&image).unwrap()[0].rgb, [0, 255, 96, 128, 191, 255]);
    }
}
