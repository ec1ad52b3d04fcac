//! Draws which keys each row sees, as SVG: of a star layout in both phases, or of each mask.
//!
//! Every cell is asked of the library: the tokens of a rank's local sequence, its mask, and whether
//! a row sees a key.

mod cells;
mod masks;
mod star;

use cells::area;
use clap::Parser;
use star::{Picture, RankMap};
use star_attention::{RankLayout, StarLayout};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Draws the star mask of a layout as SVG, or all kinds of masks.
#[derive(Debug, Parser)]
struct Args {
    /// Tokens of the context
    #[arg(long, default_value_t = 32)]
    context_len: usize,
    /// Tokens of a block
    #[arg(long, default_value_t = 8)]
    block_len: usize,
    /// Tokens of the anchor
    #[arg(long, default_value_t = 4)]
    anchor_len: usize,
    /// Ranks that share the context
    #[arg(long, alias = "hosts", default_value_t = 4)]
    ranks: usize,
    /// Query tokens
    #[arg(long, default_value_t = 4)]
    query_len: usize,
    /// File to write
    #[arg(long, default_value = "docs/star-mask.svg")]
    output: PathBuf,
    /// Folder to write a picture of each mask to, instead
    #[arg(long, value_name = "FOLDER")]
    masks: Option<PathBuf>,
}

/// Above this a cell is smaller than a pixel of any screen.
const MOST_TOKENS: usize = 4096;
/// Above this the legend is longer than the picture.
const MOST_RANKS: usize = 20;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            print!("{error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.to_string();
            let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
            return fail(&lines.collect::<Vec<_>>().join(" "));
        }
    };
    match draw(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => fail(&format!("error: {message}")),
    }
}

fn fail(line: &str) -> ExitCode {
    eprintln!("{line}");
    ExitCode::from(2)
}

fn draw(args: &Args) -> Result<(), String> {
    if let Some(folder) = &args.masks {
        return draw_masks(folder);
    }
    for (name, number, most) in [
        ("--context-len", args.context_len, MOST_TOKENS),
        ("--query-len", args.query_len, MOST_TOKENS),
        ("--ranks", args.ranks, MOST_RANKS),
    ] {
        if !(1..=most).contains(&number) {
            return Err(format!("{name}: expected 1 to {most}, got {number}"));
        }
    }
    let layout = StarLayout::builder(args.context_len)
        .block_len(args.block_len)
        .anchor_len(args.anchor_len)
        .ranks(args.ranks)
        .build()
        .map_err(|e| e.to_string())?;
    let ranks: Vec<RankLayout> =
        (0..args.ranks).map(|rank| layout.rank(rank)).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    let maps: Vec<RankMap> = ranks.iter().map(|rank| RankMap::of(&layout, rank, args.query_len)).collect();
    let svg = Picture::new(&layout, args.query_len).draw(&ranks, &maps);
    write_whole(&args.output, svg.as_bytes())
        .map_err(|e| format!("--output {}: {e}", args.output.display()))?;

    println!("rank  blocks  kept tokens  phase 1 cells  phase 2 cells");
    for (local, map) in ranks.iter().zip(&maps) {
        let (one, two) = (area(&map.own) + area(&map.anchor), area(&map.query));
        println!(
            "{:>4}  {:>6}  {:>11}  {one:>13}  {two:>13}",
            local.rank(),
            local.blocks().len(),
            local.kept().len()
        );
    }
    Ok(())
}

fn draw_masks(folder: &Path) -> Result<(), String> {
    let failed = |e: &dyn std::fmt::Display| format!("--masks {}: {e}", folder.display());
    fs::create_dir_all(folder).map_err(|e| failed(&e))?;
    println!("{:>15}  cells  made by", "mask");
    for example in masks::examples().map_err(|e| failed(&e))? {
        let (svg, cells) = example.draw();
        let path = folder.join(format!("{}.svg", example.name));
        write_whole(&path, svg.as_bytes()).map_err(|e| failed(&e))?;
        println!("{:>15}  {cells:>5}  {}", example.name, example.made_by());
    }
    Ok(())
}

/// Writes beside `path` and renames, so that `path` never holds half a picture.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().ok_or(std::io::ErrorKind::IsADirectory)?.to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // What went wrong is reported; the partial file may not even exist.
        let _ = fs::remove_file(&partial);
    }
    written
}
