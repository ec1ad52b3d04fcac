//! Both phases of a star layout in one picture.

use crate::cells::{Rectangle, path, rectangles, text};
use star_attention::cpu::reference::sees;
use star_attention::{Mask, RankLayout, StarLayout};
use std::fmt::Write as _;

/// One colour for each rank, told apart also by readers who do not see all colours (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6d00"];

/// The cells that the rows of one rank see: columns are context tokens and then query tokens.
pub struct RankMap {
    /// Phase 1, rows are the context tokens that the rank keeps: cells of its own tokens.
    pub own: Vec<Rectangle>,
    /// The same rows, cells of the anchor in front of its own tokens.
    pub anchor: Vec<Rectangle>,
    /// Phase 2, rows are query tokens: cells of the rank's shard.
    pub query: Vec<Rectangle>,
}

impl RankMap {
    pub fn of(layout: &StarLayout, local: &RankLayout, query_len: usize) -> Self {
        let tokens: Vec<usize> = local.tokens().collect();
        let (local_len, kept) = (tokens.len(), local.kept());
        let block = |token: usize| token / layout.block_len();
        // The anchor's keys come from the rows in front of the own ones, or, on the rank of block
        // 0, from block 0.
        let phase_1 = |through_anchor: bool| {
            rectangles(kept.clone().map(|row| {
                let sees =
                    (0..local_len).filter(move |&key| sees(&local.mask(), local_len, local_len, row, key));
                let columns = sees.map(|key| tokens[key]);
                let columns = columns.filter(|&key| (block(key) != block(tokens[row])) == through_anchor);
                (tokens[row], columns.collect())
            }))
        };
        let (own, anchor) = (phase_1(false), phase_1(true));

        let mut shard: Vec<usize> = tokens[kept.clone()].to_vec();
        let mut mask = Mask::Full;
        if local.rank() == layout.query_rank() {
            shard.extend((0..query_len).map(|query| layout.query_position() + query));
            mask = Mask::Causal;
        }
        let query = rectangles((0..query_len).map(|row| {
            let sees = (0..shard.len()).filter(|&key| sees(&mask, query_len, shard.len(), row, key));
            (row, sees.map(|key| shard[key]).collect())
        }));
        Self { own, anchor, query }
    }
}

/// Where things stand, in pixels.
pub struct Picture {
    layout: StarLayout,
    query_len: usize,
    cell: f64,
    phase_1: (f64, f64),
    phase_2: (f64, f64),
    legend: f64,
    size: (f64, f64),
}

impl Picture {
    /// The longer side of the cells together.
    const CELLS: f64 = 540.0;
    const LEGEND_LINE: f64 = 24.0;
    /// From the middle of a line of text down to its baseline.
    const MIDDLE: f64 = 4.5;

    pub fn new(layout: &StarLayout, query_len: usize) -> Self {
        let (context, query) = (layout.context_len() as f64, query_len as f64);
        let cell = (Self::CELLS / (context + query)).min(24.0);
        let phase_1 = (112.0, 128.0);
        let phase_2 = (phase_1.0, phase_1.1 + context * cell + 66.0);
        let legend = phase_1.0 + (context + query) * cell + 32.0;
        let lines = layout.ranks() as f64 + 7.0;
        let bottom = (phase_2.1 + query * cell).max(phase_1.1 + lines * Self::LEGEND_LINE);
        Self {
            layout: *layout,
            query_len,
            cell,
            phase_1,
            phase_2,
            legend,
            size: (legend + 222.0, bottom + 34.0),
        }
    }

    pub fn draw(&self, ranks: &[RankLayout], maps: &[RankMap]) -> String {
        let (width, height) = self.size;
        let mut svg = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0} {height:.0}" width="{width:.0}" height="{height:.0}" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#24292f">
<title>The star mask</title>
<rect x="0.5" y="0.5" width="{:.0}" height="{:.0}" rx="8" fill="#ffffff" stroke="#d0d7de"/>
"##,
            width - 1.0,
            height - 1.0
        );
        self.texts(&mut svg, ranks);
        self.cells(&mut svg, maps);
        self.legend(&mut svg, ranks);
        svg.push_str("</svg>\n");
        svg
    }

    /// Titles, axes, and the names of blocks and ranks.
    fn texts(&self, svg: &mut String, ranks: &[RankLayout]) {
        let (layout, cell) = (&self.layout, self.cell);
        let (context, query) = (layout.context_len() as f64 * cell, self.query_len as f64 * cell);
        let (left, top) = self.phase_1;
        let (_, bottom) = self.phase_2;
        text(svg, (24.0, 34.0), r#"font-size="17" font-weight="bold""#, "Star Attention: who sees what");
        text(svg, (24.0, 68.0), r#"font-weight="bold""#, "Phase 1: context encoding, no communication");
        let axis = "keys: context tokens →";
        text(svg, (left, top - 28.0), r##"fill="#57606a""##, axis);
        text(
            svg,
            (24.0, bottom - 30.0),
            r#"font-weight="bold""#,
            "Phase 2: query and generated tokens, merged over ranks",
        );
        text(svg, (left, bottom - 10.0), r##"fill="#57606a""##, "keys: context tokens, then query tokens →");
        let y = top + context / 2.0;
        let upwards = format!(r##"transform="rotate(-90 34 {y:.1})" text-anchor="middle" fill="#57606a""##);
        text(svg, (34.0, y), &upwards, "rows: context tokens ↓");
        let y = bottom + query / 2.0 + Self::MIDDLE;
        text(svg, (left - 10.0, y), r##"text-anchor="end" fill="#57606a""##, "query rows");
        for local in ranks.iter().filter(|local| !local.kept().is_empty()) {
            let own = local.own_tokens();
            let y = top + (own.start + own.end) as f64 / 2.0 * cell + Self::MIDDLE;
            if own.len() as f64 * cell >= 14.0 {
                let style =
                    format!(r#"text-anchor="end" font-weight="bold" fill="{}""#, colour(local.rank()));
                text(svg, (left - 10.0, y), &style, &format!("rank {}", local.rank()));
            }
            for block in local.blocks() {
                let start = block * layout.block_len();
                let end = (start + layout.block_len()).min(layout.context_len());
                if (end - start) as f64 * cell >= 52.0 {
                    let x = left + (start + end) as f64 / 2.0 * cell;
                    text(
                        svg,
                        (x, top - 8.0),
                        r#"text-anchor="middle" font-size="12""#,
                        &format!("block {block}"),
                    );
                }
            }
        }
    }

    fn cells(&self, svg: &mut String, maps: &[RankMap]) {
        let (context, query, cell) = (self.layout.context_len(), self.query_len, self.cell);
        let scaled = |(x, y): (f64, f64)| format!(r#"transform="translate({x:.1} {y:.1}) scale({cell:.4})""#);
        let fill = |svg: &mut String, fill: &str, rectangles: &[Rectangle]| {
            if rectangles.is_empty() {
                return;
            }
            let _ = writeln!(svg, r#"<path {fill} d="{}"/>"#, path(rectangles));
        };
        // Lines between cells where there is room for them, and stronger ones between blocks.
        let lines = |svg: &mut String, columns: usize, rows: usize, row_blocks: bool| {
            let mut fine = String::new();
            let mut strong = String::new();
            let block = self.layout.block_len();
            for x in 1..columns {
                let path =
                    if x % block == 0 && x <= context || x == context { &mut strong } else { &mut fine };
                let _ = write!(path, "M{x} 0v{rows}");
            }
            for y in 1..rows {
                let path = if row_blocks && y % block == 0 { &mut strong } else { &mut fine };
                let _ = write!(path, "M0 {y}h{columns}");
            }
            for (path, width, room) in [(fine, 1.0, 8.0), (strong, 2.5, 0.0)] {
                let wanted = cell >= room && (room > 0.0 || cell * block as f64 >= 8.0);
                if wanted && !path.is_empty() {
                    let width = width / cell;
                    let _ =
                        writeln!(svg, r##"<path stroke="#ffffff" stroke-width="{width:.4}" d="{path}"/>"##);
                }
            }
        };
        let _ = writeln!(svg, r#"<g {} shape-rendering="crispEdges">"#, scaled(self.phase_1));
        fill(svg, r##"fill="#eaeef2""##, &[[0, 0, context, context]]);
        for (rank, map) in maps.iter().enumerate() {
            fill(svg, &format!(r#"fill="{}""#, colour(rank)), &map.own);
            fill(svg, &format!(r#"fill="{}" fill-opacity="0.45""#, colour(rank)), &map.anchor);
        }
        lines(svg, context, context, true);
        let anchor = self.layout.anchor_len().min(context);
        if anchor > 0 {
            let dashes = format!(r#"stroke-width="{:.4}" stroke-dasharray="{:.4}""#, 2.0 / cell, 6.0 / cell);
            let _ = writeln!(
                svg,
                r##"<rect width="{anchor}" height="{context}" fill="none" stroke="#24292f" {dashes}/>"##
            );
        }
        svg.push_str("</g>\n");
        let _ = writeln!(svg, r#"<g {} shape-rendering="crispEdges">"#, scaled(self.phase_2));
        fill(svg, r##"fill="#eaeef2""##, &[[0, 0, context + query, query]]);
        for (rank, map) in maps.iter().enumerate() {
            fill(svg, &format!(r#"fill="{}""#, colour(rank)), &map.query);
        }
        lines(svg, context + query, query, false);
        svg.push_str("</g>\n");
    }

    fn legend(&self, svg: &mut String, ranks: &[RankLayout]) {
        let layout = &self.layout;
        let x = self.legend;
        let mut y = self.phase_1.1 + 8.0;
        let mut line = |svg: &mut String, swatch: &str, words: &str| {
            if !swatch.is_empty() {
                let _ =
                    writeln!(svg, r#"<rect x="{x:.1}" y="{:.1}" width="16" height="16" {swatch}/>"#, y - 8.0);
            }
            let at = if swatch.is_empty() { x } else { x + 26.0 };
            text(svg, (at, y + Self::MIDDLE), "", words);
            y += Self::LEGEND_LINE;
        };
        for local in ranks {
            let blocks = local.blocks();
            let held = match blocks.len() {
                0 => "no block".to_string(),
                1 => format!("block {}", blocks.start),
                _ => format!("blocks {} to {}", blocks.start, blocks.end - 1),
            };
            let query = if local.rank() == layout.query_rank() { ", query" } else { "" };
            let swatch = format!(r#"fill="{}""#, colour(local.rank()));
            line(svg, &swatch, &format!("rank {}: {held}{query}", local.rank()));
        }
        if let Some(last) = layout.anchor_len().checked_sub(1) {
            line(svg, r##"fill="#57606a" fill-opacity="0.45""##, "seen through the anchor");
            let dashed = r##"fill="none" stroke="#24292f" stroke-width="2" stroke-dasharray="4""##;
            line(svg, dashed, &format!("anchor: tokens 0 to {last}"));
        }
        line(svg, r##"fill="#eaeef2""##, "not seen");
        line(svg, "", "");
        line(svg, "", &format!("{} context tokens", layout.context_len()));
        line(svg, "", &format!("in blocks of {}", layout.block_len()));
        line(svg, "", &format!("{} query tokens", self.query_len));
    }
}

fn colour(rank: usize) -> &'static str {
    COLOURS[rank % COLOURS.len()]
}
