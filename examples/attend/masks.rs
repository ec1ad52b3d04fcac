//! Which keys rows see: one mask for all sequences, or one for each from a JSON file.

use crate::{Args, Result};
use clap::ValueEnum;
use serde_json::Value;
use star_attention::Mask;
use std::fs;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Kind {
    Full,
    Causal,
    Star,
}

pub enum Masks {
    Same(Mask),
    Each { masks: Vec<Mask>, file: String },
}

impl Masks {
    pub fn of(args: &Args) -> Result<Self> {
        let lens = [
            ("--anchor-len", args.anchor_len),
            ("--block-len", args.block_len),
            ("--first-block-len", args.first_block_len),
        ];
        let Some(path) = &args.masks else {
            let mask = mask(args.mask.unwrap_or(Kind::Full), lens, "--mask star")?;
            mask.validate().map_err(|e| e.to_string())?;
            return Ok(Self::Same(mask));
        };
        let given = lens.iter().find(|(_, len)| len.is_some()).map(|(name, _)| *name);
        if let Some(name) = given.or(args.mask.map(|_| "--mask")) {
            return Err(format!("{name}: not with --masks"));
        }
        let file = format!("--masks {}", path.display());
        let bytes = fs::read(path).map_err(|e| format!("{file}: {e}"))?;
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
    pub fn for_each_of(&self, sequences: usize) -> Result<Vec<Mask>> {
        match self {
            Self::Same(mask) => Ok(vec![*mask; sequences]),
            Self::Each { masks, .. } if masks.len() == sequences => Ok(masks.clone()),
            Self::Each { masks, file } => {
                Err(format!("{file}: expected {sequences} masks, one for each sequence, got {}", masks.len()))
            }
        }
    }
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
    Ok(Mask::Star { anchor_len: anchor_len?, block_len: block_len?, first_block_len: first_block_len? })
}

fn parse(entry: &Value) -> Result<Mask> {
    const LENS: [&str; 3] = ["anchor_len", "block_len", "first_block_len"];
    let object = entry.as_object().ok_or("expected an object")?;
    if let Some(name) = object.keys().find(|name| *name != "mask" && !LENS.contains(&name.as_str())) {
        return Err(format!("unknown member {name}"));
    }
    let kind = object.get("mask").and_then(Value::as_str).unwrap_or_default();
    let kind = Kind::from_str(kind, false).map_err(|_| "mask: expected full, causal or star")?;
    let mut lens = LENS.map(|name| (name, None));
    for (name, len) in &mut lens {
        if let Some(value) = object.get(*name).filter(|value| !value.is_null()) {
            let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
            *len = Some(number.ok_or_else(|| format!("{name}: expected a whole number, got {value}"))?);
        }
    }
    mask(kind, lens, "mask star")
}
