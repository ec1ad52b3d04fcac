//! A picture of each kind of mask, with the line of Rust that makes it.

use crate::cells::{area, lines, path, rectangles, text};
use star_attention::cpu::reference::sees;
use star_attention::{BlockList, Mask, Result};
use std::fmt::Write as _;

/// Rows and keys of a picture.
const TOKENS: usize = 24;
/// Pixels of a cell.
const CELL: usize = 12;

pub struct Example {
    pub name: &'static str,
    made_by: &'static str,
    mask: Mask,
}

/// The masks of the expressions, each with its text.
macro_rules! examples {
    ($($name:literal: $made_by:expr,)*) => {
        vec![$(Example { name: $name, made_by: stringify!($made_by), mask: $made_by },)*]
    };
}

#[rustfmt::skip] // each on a line of its own, as it is printed
pub fn examples() -> Result<Vec<Example>> {
    Ok(examples! {
        "full": Mask::Full,
        "causal": Mask::Causal,
        "window": Mask::Window { left: Some(6), right: Some(3) },
        "sliding-window": Mask::sliding_window(6)?,
        "chunked": Mask::chunked(8)?,
        "star": Mask::Star { anchor_len: 4, block_len: 8, first_block_len: 8, left: None },
        "star-window": Mask::Star { anchor_len: 4, block_len: 8, first_block_len: 8, left: None }.with_sliding_window(3)?,
        "blocks": Mask::from(BlockList::new(8, &[0, 1, 3, 5], &[0..8, 0..4, 8..16, 4..12, 16..24])?.causal()),
    })
}

impl Example {
    /// The expression that makes it, in one line.
    pub fn made_by(&self) -> String {
        self.made_by.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// The picture, and how many cells are seen.
    pub fn draw(&self) -> (String, usize) {
        let seen = |row| (0..TOKENS).filter(|&key| sees(&self.mask, TOKENS, TOKENS, row, key)).collect();
        let cells = rectangles((0..TOKENS).map(|row| (row, seen(row))));
        let (side, left, top) = (TOKENS * CELL, 34, 30);
        let mut svg = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#57606a">
<title>The mask {2}</title>
<rect width="{0}" height="{1}" rx="8" fill="#ffffff"/>
"##,
            left + side + 12,
            top + side + 12,
            self.name
        );
        text(&mut svg, (left as f64, 20.0), "", "keys →");
        let y = (top + side / 2) as f64;
        let upwards = format!(r#"transform="rotate(-90 20 {y:.1})" text-anchor="middle""#);
        text(&mut svg, (20.0, y), &upwards, "← rows");
        let _ = writeln!(
            svg,
            r#"<g transform="translate({left} {top}) scale({CELL})" shape-rendering="crispEdges">"#
        );
        let _ = writeln!(svg, r##"<rect width="{TOKENS}" height="{TOKENS}" fill="#eaeef2"/>"##);
        let _ = writeln!(svg, r##"<path fill="#0072b2" d="{}"/>"##, path(&cells));
        let between = lines(1..TOKENS, 1..TOKENS, [TOKENS; 2]);
        let width = 1.0 / CELL as f64;
        let _ = writeln!(svg, r##"<path stroke="#ffffff" stroke-width="{width:.4}" d="{between}"/>"##);
        svg.push_str("</g>\n</svg>\n");
        (svg, area(&cells))
    }
}
