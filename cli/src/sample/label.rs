//! Words on pictures: a bitmap font of 8×8 pixels, enlarged.

use font8x8::{BASIC_FONTS, GREEK_FONTS, HIRAGANA_FONTS, LATIN_FONTS, UnicodeFonts};

use ella_worker::draw::Picture;

/// Width and height of a letter.
const LETTER: u32 = 8;

/// What cut text ends in.
const MORE: &str = "...";

/// A size of letters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pen {
    scale: u32,
}

impl Pen {
    /// The size that suits a picture of this width.
    pub(super) fn for_width(width: u32) -> Self {
        Self { scale: (width / 256).max(1) }
    }

    /// The height of a line.
    pub(super) fn line(self) -> u32 {
        (LETTER + 2) * self.scale
    }

    /// How wide a text is.
    pub(super) fn width(self, text: &str) -> u32 {
        text.chars().count() as u32 * LETTER * self.scale
    }

    /// Writes one line, its left top corner at (x, y); what has no glyph is a question mark.
    pub(super) fn write(self, sheet: &mut Picture, (x, y): (u32, u32), text: &str) {
        let dot = Picture { width: self.scale, height: self.scale, rgb: vec![40; 3 * (self.scale * self.scale) as usize] };
        for (place, letter) in (0..).zip(text.chars()) {
            for (row, bits) in (0..).zip(glyph(letter)) {
                for column in (0..LETTER).filter(|column| bits >> column & 1 == 1) {
                    sheet.paste(&dot, (x + (place * LETTER + column) * self.scale, y + (row + 1) * self.scale));
                }
            }
        }
    }

    /// Breaks a text into at most `most` lines that fit into `width`; a longer one is cut, which dots tell.
    pub(super) fn wrap(self, text: &str, width: u32, most: usize) -> Vec<String> {
        let room = (width / (LETTER * self.scale)).max(MORE.len() as u32 + 1) as usize;
        let mut lines = vec![String::new()];
        for word in text.split_whitespace() {
            // A word longer than a line is broken anywhere.
            for piece in word.chars().collect::<Vec<_>>().chunks(room) {
                let (line, piece) = (lines.last().map_or(0, |line| line.chars().count()), piece.iter().collect::<String>());
                match lines.last_mut() {
                    Some(last) if line == 0 => *last = piece,
                    Some(last) if line + 1 + piece.chars().count() <= room => *last = format!("{last} {piece}"),
                    _ => lines.push(piece),
                }
            }
        }
        if lines.len() > most {
            lines.truncate(most);
            if let Some(last) = lines.last_mut() {
                let kept: String = last.chars().take(room - MORE.len()).collect();
                *last = kept.trim_end().to_owned() + MORE;
            }
        }
        lines
    }
}

/// Rows of a letter, the lowest bit to the left.
fn glyph(letter: char) -> [u8; 8] {
    let plain = match letter {
        '‘' | '’' => '\'',
        '“' | '”' => '"',
        '–' | '—' => '-',
        other => other,
    };
    let known = BASIC_FONTS.get(plain).or(LATIN_FONTS.get(plain)).or(GREEK_FONTS.get(plain)).or(HIRAGANA_FONTS.get(plain));
    known.or(BASIC_FONTS.get('?')).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_and_a_cut_is_seen() {
        let pen = Pen::for_width(64);
        assert_eq!(pen.wrap("a red circle on a plain floor", 8 * 12, 3), ["a red circle", "on a plain", "floor"]);
        assert_eq!(pen.wrap("a red circle on a plain floor", 8 * 12, 2), ["a red circle", "on a plai..."]);
        assert_eq!(pen.wrap("incomprehensibilities", 8 * 10, 3), ["incomprehe", "nsibilitie", "s"]);
        assert_eq!(pen.wrap("  ", 80, 2), [""]);
        assert_eq!(pen.wrap("several words", 1, 1), ["s..."]);
    }

    #[test]
    fn letters_are_seen_and_unknown_ones_too() {
        let ink = |text: &str| {
            let mut sheet = Picture::white(40, 20);
            Pen::for_width(64).write(&mut sheet, (2, 2), text);
            sheet.rgb
        };
        assert_ne!(ink("CLIP"), ink("ELLA"));
        assert_eq!(ink("漢"), ink("?"));
        assert_eq!(ink("’é"), ink("'é"));
        assert!(ink(" ").iter().all(|&byte| byte == 255) && ink("I").contains(&40));
    }
}
