//! What the anchor is made of: the paper's nine settings (Table 3, Llama-3.1-8B-Instruct on RULER's
//! needles at 64K tokens), and a control.

use super::llama::anchor::AnchorBlock;
use super::llama::table::table;
use super::report::{Row, percent};
use super::setting::{Extent, Setting, Star};

/// One of the nine, or the control.
pub struct Ablation {
    pub name: &'static str,
    pub setting: Setting,
    /// The paper's accuracy in percent; none for the control.
    pub paper: Option<f64>,
}

/// Of what is drawn.
const SEED: u64 = 0;

/// The nine settings, blocks of a quarter of the context, each on a rank of its own; `constant` is
/// the token of the constant anchor. Where no id from `first_word` on is a marker that means
/// something to the model, random words are the control of random tokens.
pub fn settings(constant: u32, first_word: Option<u32>) -> Vec<Ablation> {
    let star =
        |anchor, anchor_block| Setting::Star(Star { block: Extent::Part(4), anchor, ranks: 4, anchor_block });
    let with = |name, anchor_block, paper| Ablation {
        name,
        setting: star(Extent::Part(1), anchor_block),
        paper: Some(paper),
    };
    let mut settings = vec![
        Ablation { name: "global attention", setting: Setting::Dense, paper: Some(99.50) },
        Ablation {
            name: "no anchor",
            setting: star(Extent::Tokens(0), AnchorBlock::None),
            paper: Some(60.11),
        },
        with("first block, at its positions", AnchorBlock::First, 97.61),
        with("first block, at the previous block's positions", AnchorBlock::FirstAtPrevious, 97.35),
        with("first block, at random positions", AnchorBlock::FirstAtRandom { seed: SEED }, 96.79),
        with("a constant token, at the first block's positions", AnchorBlock::Constant(constant), 0.0),
        with(
            "random tokens, at the first block's positions",
            AnchorBlock::Random { seed: SEED, from: 0 },
            90.55,
        ),
        with("first block's tokens shuffled, at its positions", AnchorBlock::Shuffled { seed: SEED }, 92.96),
        with("previous block, at its positions", AnchorBlock::Previous, 94.20),
    ];
    if let Some(from) = first_word {
        let control = star(Extent::Part(1), AnchorBlock::Random { seed: SEED, from });
        let name = "control: random words, at the first block's positions";
        settings.push(Ablation { name, setting: control, paper: None });
    }
    settings
}

/// A row for each setting, beside the paper's.
pub fn text(rows: &[Row], settings: &[Ablation]) -> String {
    let heading = ["anchor", "paper, %", "here, %", "to dense, points", "of dense, %", "samples"];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    for Ablation { name, setting, paper } in settings {
        // All tasks together, or the one that there is.
        let Some(row) = rows.iter().rev().find(|row| row.setting == setting.to_string()) else { continue };
        let optional = |estimate: &Option<_>| estimate.as_ref().map_or_else(|| "-".to_owned(), percent);
        cells.push(vec![
            (*name).to_owned(),
            paper.map_or_else(|| "-".to_owned(), |paper| format!("{paper:.2}")),
            percent(&row.accuracy),
            optional(&row.difference),
            optional(&row.share),
            row.samples.to_string(),
        ]);
    }
    table(&cells)
}
