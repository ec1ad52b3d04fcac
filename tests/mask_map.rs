//! `examples/mask_map`: the picture in docs/ is what it draws, and bad options are refused.

mod common;

use common::{Folder, assert_refused, example};
use std::fs;
use std::path::Path;
use std::process::Output;

fn mask_map(output: &Path, options: &[&str]) -> Output {
    let mut command = example("mask_map");
    command.arg("--output").arg(output).args(options);
    command.output().expect("examples/mask_map, which `cargo test` builds with the tests")
}

#[test]
fn the_committed_picture_is_what_it_draws() {
    let folder = Folder::new("mask-map-picture");
    let drawn = folder.file("star-mask.svg");
    let result = mask_map(&drawn, &[]);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/star-mask.svg");
    let [drawn, committed] = [drawn, committed].map(|path| fs::read_to_string(path).unwrap());
    assert!(drawn == committed, "run `cargo run --example mask_map`");
}

/// Blocks of 8 behind an anchor of 4: 36 cells in the triangle of each, 32 of the anchor, 4 x 8 in
/// phase 2, and the 10 of the query's own triangle on the last rank.
#[test]
fn the_table_counts_cells() {
    let folder = Folder::new("mask-map-table");
    let result = mask_map(&folder.file("map.svg"), &[]);
    let text = String::from_utf8(result.stdout).unwrap();
    let cells: Vec<Vec<&str>> =
        text.lines().skip(1).map(|line| line.split_whitespace().skip(3).collect()).collect();
    assert_eq!(cells, [["36", "32"], ["68", "32"], ["68", "32"], ["68", "42"]]);
}

#[test]
fn every_layout_can_be_drawn() {
    let folder = Folder::new("mask-map-layouts");
    let drawn = folder.file("map.svg");
    for options in [
        &["--context-len", "1", "--block-len", "1", "--anchor-len", "0", "--ranks", "1", "--query-len", "1"]
            [..],
        &["--context-len", "30", "--ranks", "7", "--anchor-len", "8"],
        &["--context-len", "300", "--block-len", "32", "--ranks", "3", "--query-len", "50"],
        &["--context-len", "5", "--block-len", "100", "--anchor-len", "100", "--ranks", "20"],
    ] {
        let result = mask_map(&drawn, options);
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let svg = fs::read_to_string(&drawn).unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.len() < 64 << 10, "{} bytes for {options:?}", svg.len());
    }
    assert_eq!(folder.files(), ["map.svg"]);
}

#[test]
fn bad_options() {
    let folder = Folder::new("mask-map-options");
    for (options, message) in [
        (["--context-len", "0"], "--context-len"),
        (["--context-len", "1000000"], "--context-len"),
        (["--context-len", "many"], "--context-len"),
        (["--block-len", "0"], "block_len"),
        (["--anchor-len", "9"], "anchor_len"),
        (["--ranks", "0"], "--ranks"),
        (["--query-len", "0"], "--query-len"),
        (["--colour", "blue"], "--colour"),
    ] {
        assert_refused(&mask_map(&folder.file("map.svg"), &options), message);
    }
    assert_refused(&mask_map(&folder.file("no/folder/map.svg"), &[]), "--output");
    assert_eq!(folder.files(), Vec::<String>::new());
}

/// The pictures and lines of docs/masks.md.
#[test]
fn the_page_of_masks_is_what_it_draws() {
    let folder = Folder::new("mask-map-masks");
    let mut command = example("mask_map");
    let drawn = folder.file("drawn");
    let result = command.arg("--masks").arg(&drawn).output().unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let page = fs::read_to_string(docs.join("masks.md")).unwrap();
    let table = String::from_utf8(result.stdout).unwrap();
    assert_eq!(table.lines().count(), 9);
    for line in table.lines().skip(1) {
        let (name, rest) = line.trim_start().split_once(' ').unwrap();
        let (_, made_by) = rest.trim_start().split_once("  ").unwrap();
        let row = page.lines().find(|row| row.contains(&format!("(masks/{name}.svg)"))).expect(name);
        assert!(row.contains(&format!("| `{made_by}` |")), "{made_by}");
        let file = format!("{name}.svg");
        let [drawn, committed] =
            [drawn.join(&file), docs.join("masks").join(&file)].map(|path| fs::read_to_string(path).unwrap());
        assert!(drawn == committed, "run `cargo run --example mask_map -- --masks docs/masks`");
    }
}
