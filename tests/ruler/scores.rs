//! Scores, intervals and tables.

use super::chart::{Chart, Point, Series};
use super::llama::anchor::AnchorBlock;
use super::plot;
use super::record::{Key, Record};
use super::report;
use super::sample::Question;
use super::setting::{Extent, Setting, Star};
use super::statistics::{accuracy, difference, share};
use super::task::Task;
use proptest::prelude::*;

fn question(expected: &[&str]) -> Question {
    let expected = expected.iter().map(|&text| text.to_owned()).collect();
    Question { query: "?".into(), answer: String::new(), expected }
}

#[test]
fn a_score_is_the_share_found() {
    let two = question(&["1234567", "Paris"]);
    for (answer, score) in [
        ("", 0.0),
        ("1234567", 0.5),
        ("they are PARIS and 1234567.", 1.0),
        ("paris paris", 0.5),
        ("123456 7", 0.0),
        ("91234567", 0.5),
    ] {
        assert_eq!(two.score(answer), score, "{answer:?}");
    }
}

proptest! {
    /// More text never has less in it.
    #[test]
    fn a_score_grows_with_the_answer(expected in prop::collection::vec("[a-c]{1,2}", 1..5), answer in "[A-Ca-c ]{0,12}", more in "[a-c ]{0,6}") {
        let question = question(&expected.iter().map(String::as_str).collect::<Vec<_>>());
        let score = question.score(&answer);
        prop_assert!((0.0..=1.0).contains(&score) && score <= question.score(&(answer + &more)));
    }

    #[test]
    fn intervals_hold_their_figure(scores in prop::collection::vec(0.0..=1.0f64, 1..60), others in prop::collection::vec(0.0..=1.0f64, 60)) {
        let pairs: Vec<(f64, f64)> = scores.iter().copied().zip(others).collect();
        let estimate = accuracy(&scores).unwrap();
        prop_assert!(0.0 <= estimate.low && estimate.low <= estimate.value && estimate.value <= estimate.high && estimate.high <= 1.0);
        let estimate = difference(&pairs).unwrap();
        prop_assert!(estimate.low <= estimate.value && estimate.value <= estimate.high);
        if let Some(estimate) = share(&pairs) {
            prop_assert!(estimate.low <= estimate.high && estimate.value >= 0.0);
        }
        // Against itself nothing is gained or lost.
        let same: Vec<(f64, f64)> = scores.iter().map(|&score| (score, score)).collect();
        let estimate = difference(&same).unwrap();
        prop_assert_eq!((estimate.low, estimate.high), (0.0, 0.0));
        if scores.iter().any(|&score| score > 0.0) {
            let estimate = share(&same).unwrap();
            prop_assert_eq!((estimate.low, estimate.value, estimate.high), (1.0, 1.0, 1.0));
        }
    }
}

/// Wilson's interval of 45 in 50, and of all of 20, by their formula.
#[test]
fn accuracy_has_wilson_s_interval() {
    let scores: Vec<f64> = (0..50).map(|index| f64::from(u8::from(index < 45))).collect();
    let estimate = accuracy(&scores).unwrap();
    assert!((estimate.value - 0.9).abs() < 1e-12);
    assert!((estimate.low - 0.7864).abs() < 1e-4 && (estimate.high - 0.9565).abs() < 1e-4, "{estimate:?}");
    let all = accuracy(&[1.0; 20]).unwrap();
    assert!((all.low - 0.8389).abs() < 1e-4 && all.high == 1.0, "{all:?}");
    assert_eq!(accuracy(&[]), None);
    assert_eq!(difference(&[]), None);
    assert_eq!(share(&[(1.0, 0.0)]), None);
}

fn record(setting: &str, task: Task, seed: u64, score: f64, encode: f64) -> Record {
    let key = Key { model: "m".into(), setting: setting.into(), len: 64, task, seed };
    Record { key, context_len: 60, score, encode, query: 0.1, answer: String::new() }
}

#[test]
fn rows_compare_the_same_samples() {
    let mut records = vec![
        record("dense", Task::Qa1, 0, 1.0, 4.0),
        record("dense", Task::Qa1, 1, 1.0, 4.0),
        record("dense", Task::Vt2, 0, 0.5, 4.0),
        record("star", Task::Qa1, 0, 1.0, 1.0),
        record("star", Task::Qa1, 1, 0.0, 1.0),
        record("star", Task::Vt2, 0, 0.5, 2.0),
    ];
    // One that dense has not: it counts for the accuracy, and is not compared.
    records.push(record("star", Task::Vt2, 1, 1.0, 100.0));
    let rows = report::rows(&records);
    let row =
        |setting: &str, task| rows.iter().find(|row| row.setting == setting && row.task == task).unwrap();
    let qa = row("star", Some(Task::Qa1));
    assert_eq!((qa.samples, qa.accuracy.value, qa.difference.unwrap().value), (2, 0.5, -0.5));
    assert_eq!((qa.share.unwrap().value, qa.speed_up), (0.5, Some(4.0)));
    let vt = row("star", Some(Task::Vt2));
    assert_eq!(
        (vt.samples, vt.accuracy.value, vt.difference.unwrap().value, vt.speed_up),
        (2, 0.75, 0.0, Some(2.0))
    );
    let all = row("star", None);
    assert_eq!((all.samples, all.accuracy.value, all.speed_up), (4, 0.625, Some(3.0)));
    assert_eq!(row("dense", None).speed_up, None);
    assert_eq!(report::csv(&rows).lines().count(), 1 + rows.len());
    assert!(report::csv(&rows).lines().all(|line| line.split(',').count() == 14));
    assert!(report::text(&rows).contains("62.5"));
}

#[test]
fn a_setting_with_a_comma_is_one_field() {
    let rows = report::rows(&[record("star, of one", Task::Qa1, 0, 1.0, 1.0)]);
    let csv = report::csv(&rows);
    assert!(csv.lines().skip(1).all(|line| line.starts_with("64,\"star, of one\",")), "{csv}");
}

#[test]
fn a_chart_has_all_points() {
    let point = |x: f64, y: f64| Point { x, y, low: y, high: y };
    let points = vec![point(512.0, 1.0), point(1048576.0, 100.0)];
    for log_y in [false, true] {
        let series = vec![Series { name: "star".into(), points: points.clone(), dashed: false }];
        let svg = Chart { title: "t", x: "tokens", y: "s", log_y, series }.svg().unwrap();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains(">1M<") && svg.contains(">512<") && !svg.contains("NaN"));
    }
    assert!(Chart { title: "t", x: "x", y: "y", log_y: false, series: Vec::new() }.svg().is_none());
}

/// Over lengths every setting is a line; of one length, what differs is the axis, and settings
/// without a place on it are lines across.
#[test]
fn accuracy_is_drawn_over_what_differs() {
    let star =
        |block, anchor| Setting::Star(Star { block, anchor, ranks: 2, anchor_block: AnchorBlock::First });
    let quarter = Extent::Part(4);
    let drawn = |settings: &[Setting], lens: &[usize]| {
        let at = |len: usize| {
            settings.iter().map(move |setting| {
                let mut record = record(&setting.to_string(), Task::Qa1, 0, 1.0, 1.0);
                record.key.len = len;
                record
            })
        };
        let records: Vec<Record> = lens.iter().flat_map(|&len| at(len)).collect();
        let svg = plot::accuracy(&report::rows(&records), settings).unwrap();
        let axis = ["tokens of the anchor", "tokens of a block", "tokens"];
        let axis = axis.into_iter().find(|axis| svg.contains(&format!(">{axis}<"))).unwrap();
        (axis, svg.matches("stroke-dasharray").count() / 2, svg.matches("<circle").count())
    };
    let anchors = [
        Setting::Dense,
        star(quarter, Extent::Tokens(0)),
        star(quarter, quarter),
        star(quarter, Extent::Part(1)),
    ];
    assert_eq!(drawn(&anchors, &[64]), ("tokens of the anchor", 2, 6));
    assert_eq!(drawn(&anchors, &[64, 128]), ("tokens", 1, 8));
    let blocks = [Setting::Dense, star(quarter, Extent::Part(1)), star(Extent::Part(8), Extent::Part(1))];
    assert_eq!(drawn(&blocks, &[64]), ("tokens of a block", 1, 4));
    let both = [star(quarter, Extent::Part(1)), star(Extent::Part(8), quarter)];
    assert_eq!(drawn(&both, &[64]), ("tokens", 0, 2));
}
