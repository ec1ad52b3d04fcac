//! Tables of what was run, as text and as CSV.

use super::llama::table::table;
use super::record::Record;
use super::statistics::{Estimate, accuracy, difference, share};
use super::task::Task;
use std::collections::BTreeMap;

/// The records of one setting, length and task.
#[derive(Clone, Debug)]
pub struct Row {
    pub setting: String,
    pub len: usize,
    /// `None` for all tasks together.
    pub task: Option<Task>,
    pub samples: usize,
    pub accuracy: Estimate,
    /// Against dense attention on the same samples, if that was run: the difference, and the share
    /// of its accuracy.
    pub difference: Option<Estimate>,
    pub share: Option<Estimate>,
    /// Dense's time of phase 1 for the time it took here.
    pub speed_up: Option<f64>,
}

/// A sample: its task and seed.
type Which = (Task, u64);

/// A row for each setting, length and task, and one for all tasks together; in the order in which
/// settings came.
pub fn rows(records: &[Record]) -> Vec<Row> {
    let mut settings: Vec<&str> = Vec::new();
    let mut groups: BTreeMap<(usize, usize), BTreeMap<Which, &Record>> = BTreeMap::new();
    for record in records {
        let key = &record.key;
        let setting = settings.iter().position(|&setting| setting == key.setting).unwrap_or_else(|| {
            settings.push(&key.setting);
            settings.len() - 1
        });
        groups.entry((key.len, setting)).or_default().insert((key.task, key.seed), record);
    }
    let dense = settings.iter().position(|&setting| setting == "dense");
    let mut rows = Vec::new();
    for (&(len, setting), group) in &groups {
        let baseline = dense.filter(|&dense| dense != setting).and_then(|dense| groups.get(&(len, dense)));
        let tasks: Vec<Task> =
            Task::ALL.into_iter().filter(|&task| group.keys().any(|which| which.0 == task)).collect();
        let each = tasks.iter().map(|&task| Some(task));
        for task in each.chain((tasks.len() > 1).then_some(None)) {
            let mine: BTreeMap<Which, &Record> = group
                .iter()
                .filter(|(which, _)| task.is_none_or(|task| which.0 == task))
                .map(|(&which, &record)| (which, record))
                .collect();
            rows.extend(row(settings[setting], len, task, &mine, baseline));
        }
    }
    rows
}

fn row(
    setting: &str,
    len: usize,
    task: Option<Task>,
    records: &BTreeMap<Which, &Record>,
    dense: Option<&BTreeMap<Which, &Record>>,
) -> Option<Row> {
    let scores: Vec<f64> = records.values().map(|record| record.score).collect();
    let pairs: Vec<(&Record, &Record)> =
        records.iter().filter_map(|(which, &record)| Some((record, *dense?.get(which)?))).collect();
    let both: Vec<(f64, f64)> = pairs.iter().map(|(star, dense)| (star.score, dense.score)).collect();
    let times = |time: fn(&(&Record, &Record)) -> f64| pairs.iter().map(time).sum::<f64>();
    Some(Row {
        setting: setting.to_owned(),
        len,
        task,
        samples: scores.len(),
        accuracy: accuracy(&scores)?,
        difference: difference(&both),
        share: share(&both),
        speed_up: (!pairs.is_empty())
            .then(|| times(|(_, dense)| dense.encode) / times(|(star, _)| star.encode)),
    })
}

/// `97.5 [95.1, 98.8]`, of a share.
pub fn percent(estimate: &Estimate) -> String {
    let Estimate { value, low, high } = *estimate;
    format!("{:.1} [{:.1}, {:.1}]", 100.0 * value, 100.0 * low, 100.0 * high)
}

fn optional<T>(value: &Option<T>, text: impl Fn(&T) -> String) -> String {
    value.as_ref().map_or_else(|| "-".to_owned(), text)
}

/// All rows: accuracy and its interval in percent, difference to dense in points, share of dense,
/// speed-up of phase 1.
pub fn text(rows: &[Row]) -> String {
    let heading =
        ["tokens", "setting", "task", "samples", "accuracy, %", "to dense, points", "of dense, %", "phase 1"];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    cells.extend(rows.iter().map(|row| {
        vec![
            row.len.to_string(),
            row.setting.clone(),
            row.task.map_or("all", Task::name).to_owned(),
            row.samples.to_string(),
            percent(&row.accuracy),
            optional(&row.difference, percent),
            optional(&row.share, percent),
            optional(&row.speed_up, |speed_up| format!("{speed_up:.2}x")),
        ]
    }));
    table(&cells)
}

/// The same rows for a spreadsheet, as fractions.
pub fn csv(rows: &[Row]) -> String {
    // A setting can have commas, but no quotes.
    let quoted = |text: &str| if text.contains(',') { format!("\"{text}\"") } else { text.to_owned() };
    let estimate = |estimate: &Option<Estimate>| {
        estimate.map_or_else(
            || ",,".to_owned(),
            |Estimate { value, low, high }| format!("{value:.5},{low:.5},{high:.5}"),
        )
    };
    let line = |row: &Row| {
        format!(
            "{},{},{},{},{},{},{},{}\n",
            row.len,
            quoted(&row.setting),
            row.task.map_or("all", Task::name),
            row.samples,
            estimate(&Some(row.accuracy)),
            estimate(&row.difference),
            estimate(&row.share),
            row.speed_up.map_or_else(String::new, |speed_up| format!("{speed_up:.4}"))
        )
    };
    let heading = "tokens,setting,task,samples,accuracy,accuracy_low,accuracy_high,difference,difference_low,difference_high,\
                   share,share_low,share_high,speed_up\n";
    heading.to_owned() + &rows.iter().map(line).collect::<String>()
}
