//! Masks, from the command line, a JSON file or the input's tensors.

use crate::file::File;
use crate::{Args, Result};
use clap::ValueEnum;
use serde_json::{Map, Value};
use star_attention::{BlockList, Mask};
use std::fs;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Kind {
    Full,
    Causal,
    Star,
    /// The ranges of keys of the tensors row_offsets and row_ranges
    Blocks,
}

pub enum Masks {
    Same(Mask),
    /// The block list that the input holds.
    Listed {
        tile_rows: usize,
        causal: bool,
    },
    Each {
        masks: Vec<Mask>,
        file: String,
    },
}

/// Keys before and behind a row's own that it sees; all if none is given.
type Window = [Option<usize>; 2];

impl Masks {
    pub fn of(args: &Args) -> Result<Self> {
        let lens = [
            ("--anchor-len", args.anchor_len),
            ("--block-len", args.block_len),
            ("--first-block-len", args.first_block_len),
        ];
        let window = args.window.as_deref().map(window_of).transpose()?;
        if let Some(path) = &args.masks {
            let given = lens.iter().find(|(_, len)| len.is_some()).map(|(name, _)| *name);
            let given = given.or(args.mask.map(|_| "--mask")).or(window.map(|_| "--window"));
            return match given.or(args.block_rows.map(|_| "--block-rows")) {
                Some(name) => Err(format!("{name}: not with --masks")),
                None => Self::from_json(&path.display().to_string(), fs::read(path)),
            };
        }
        let kind = args.mask.unwrap_or(Kind::Full);
        if kind != Kind::Blocks {
            let given = args.block_rows.map(|_| "--block-rows");
            if let Some(name) = given.or(args.block_causal.then_some("--block-causal")) {
                return Err(format!("{name}: only with --mask blocks"));
            }
        } else if window.is_some() {
            return Err("--window: not with --mask blocks".into());
        }
        let mask = mask(kind, lens, "--mask star")?;
        if kind == Kind::Blocks {
            let tile_rows = args.block_rows.ok_or("--block-rows: needed with --mask blocks")?;
            return Ok(Self::Listed { tile_rows, causal: args.block_causal });
        }
        let mask = with_window(mask, window);
        mask.validate().map_err(|e| e.to_string())?;
        Ok(Self::Same(mask))
    }

    fn from_json(path: &str, bytes: std::io::Result<Vec<u8>>) -> Result<Self> {
        let file = format!("--masks {path}");
        let bytes = bytes.map_err(|e| format!("{file}: {e}"))?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|e| format!("{file}: {e}"))?;
        let list = json.as_array().ok_or_else(|| format!("{file}: expected a list"))?;
        let masks = list.iter().enumerate().map(|(index, entry)| {
            let mask =
                parse(entry).and_then(|mask| mask.validate().map(|()| mask).map_err(|e| e.to_string()));
            mask.map_err(|e| format!("{file}: sequence {index}: {e}"))
        });
        Ok(Self::Each { masks: masks.collect::<Result<_>>()?, file })
    }

    /// A mask for each of so many sequences.
    pub fn for_each_of(&self, sequences: usize, input: &File<'_>) -> Result<Vec<Mask>> {
        match self {
            Self::Same(mask) => Ok(vec![mask.clone(); sequences]),
            Self::Listed { tile_rows, causal } => {
                let list = block_list(*tile_rows, input)?;
                let list = if *causal { list.causal() } else { list };
                Ok(vec![Mask::from(list); sequences])
            }
            Self::Each { masks, .. } if masks.len() == sequences => Ok(masks.clone()),
            Self::Each { masks, file } => {
                Err(format!("{file}: expected {sequences} masks, one for each sequence, got {}", masks.len()))
            }
        }
    }
}

/// The list of the tensors `row_offsets` `[tiles + 1]` and `row_ranges` `[ranges, 2]`.
fn block_list(tile_rows: usize, input: &File<'_>) -> Result<BlockList> {
    let numbers = |name| input.numbers(name)?.ok_or_else(|| format!("{name}: needed with --mask blocks"));
    let (offsets, ranges) = (numbers("row_offsets")?, numbers("row_ranges")?);
    offsets.check_shape(&[offsets.data.len()])?;
    ranges.check_shape(&[ranges.data.len() / 2, 2])?;
    let keys: Vec<_> = ranges.lengths()?.as_chunks::<2>().0.iter().map(|&[start, end]| start..end).collect();
    BlockList::new(tile_rows, &offsets.lengths()?, &keys).map_err(|e| e.to_string())
}

/// The mask of a kind, with the lengths that a star mask has. `star` is what asks for them.
fn mask(kind: Kind, lens: [(&str, Option<usize>); 3], star: &str) -> Result<Mask> {
    if kind != Kind::Star {
        return match lens.iter().find(|(_, len)| len.is_some()) {
            Some((name, _)) => Err(format!("{name}: only with {star}")),
            None if kind == Kind::Causal => Ok(Mask::Causal),
            None => Ok(Mask::Full),
        };
    }
    let [anchor_len, block_len, first_block_len] =
        lens.map(|(name, len)| len.ok_or_else(|| format!("{name}: needed with {star}")));
    Ok(Mask::Star {
        anchor_len: anchor_len?,
        block_len: block_len?,
        first_block_len: first_block_len?,
        left: None,
    })
}

/// The mask within a window. Nothing behind a row's own key is seen under a causal mask.
fn with_window(mask: Mask, window: Option<Window>) -> Mask {
    match (mask, window) {
        (Mask::Full, Some([left, right])) => Mask::Window { left, right },
        (Mask::Causal, Some([left, _])) => Mask::Window { left, right: Some(0) },
        (Mask::Star { anchor_len, block_len, first_block_len, .. }, Some([left, _])) => {
            Mask::Star { anchor_len, block_len, first_block_len, left }
        }
        (mask, _) => mask,
    }
}

/// The window `L,R`; a side that is left empty is not limited.
fn window_of(text: &str) -> Result<Window> {
    let wrong = || format!("--window: expected L,R: keys before and behind a row's own, got {text}");
    let side = |side: &str| match side.trim() {
        "" => Ok(None),
        side => side.parse().map(Some).map_err(|_| wrong()),
    };
    let (left, right) = text.split_once(',').ok_or_else(wrong)?;
    Ok([side(left)?, side(right)?])
}

fn parse(entry: &Value) -> Result<Mask> {
    const LENS: [&str; 3] = ["anchor_len", "block_len", "first_block_len"];
    let object = entry.as_object().ok_or("expected an object")?;
    let known = |name: &str| ["mask", "window"].contains(&name) || LENS.contains(&name);
    if let Some(name) = object.keys().find(|name| !known(name)) {
        return Err(format!("unknown member {name}"));
    }
    let kind = object.get("mask").and_then(Value::as_str).unwrap_or_default();
    let kind = Kind::from_str(kind, false).ok().filter(|kind| *kind != Kind::Blocks);
    let kind = kind.ok_or("mask: expected full, causal or star")?;
    let mut lens = LENS.map(|name| (name, None));
    for (name, len) in &mut lens {
        *len = match object.get(*name) {
            Some(value) => whole(name, value)?,
            None => None,
        };
    }
    Ok(with_window(mask(kind, lens, "mask star")?, window_in(object)?))
}

/// `"window": [L, R]`; null for a side that is not limited.
fn window_in(object: &Map<String, Value>) -> Result<Option<Window>> {
    match object.get("window").filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => match value.as_array().map(Vec::as_slice) {
            Some([left, right]) => Ok(Some([whole("window", left)?, whole("window", right)?])),
            _ => Err(format!("window: expected [L, R], got {value}")),
        },
    }
}

/// A whole number, not negative; none if it is null.
fn whole(name: &str, value: &Value) -> Result<Option<usize>> {
    if value.is_null() {
        return Ok(None);
    }
    let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
    number.map(Some).ok_or_else(|| format!("{name}: expected a whole number, got {value}"))
}
