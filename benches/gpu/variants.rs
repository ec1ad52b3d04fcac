//! Variants of the kernels side by side: on the same inputs, in turns, so that clocks and
//! temperature are the same for all.

use crate::cases::{Call, Case, Sizes, Work};
use crate::device::Bench;
use crate::measure::{Effort, Failure, Figures, Rates, Times, alternate};
use crate::results::Results;
use crate::{NOT_RUN, launch, passed};
use serde_json::{Value, json};
use star_attention::Result;
use star_attention::cuda::flash::{FEW_ROWS, Plan, variants};
use star_attention::cuda::{Device, Properties};
use std::time::Instant;

/// The plans of a call by each kernel that it can be planned for. The first is what the library
/// does by itself, on a Hopper GPU by the kernels for every GPU; the others are held against it.
fn planned(properties: &Properties, call: &Call) -> Vec<(&'static str, Result<Plan>)> {
    let mut every_gpu = *properties;
    every_gpu.hopper = false;
    let mut plans = vec![("default", call.plan(&every_gpu))];
    if call.shape.query_len * call.shape.group() > FEW_ROWS && call.offsets.is_none() {
        if properties.hopper && call.shape.head_dim <= 128 {
            plans.push(("encode_hopper", call.plan(properties)));
        }
        // A variant that needs more shared memory than the chip has is no choice there. What else
        // is wrong with a call, the default says.
        let variant =
            |name| Some((name, Ok(Plan::variant(properties, &call.config, &call.shape, name).ok()?)));
        plans.extend(variants(call.shape.head_dim).filter_map(variant));
    }
    plans
}

/// The calls that variants are compared on.
pub fn cases(sizes: &Sizes) -> Vec<Case> {
    let kilo = 1024;
    let mut cases: Vec<Case> =
        [64, 96, 128, 192, 256].map(|head_dim| sizes.causal(16 * kilo, head_dim)).into();
    cases.push(sizes.full(16 * kilo));
    // Outputs of f32 behind few keys, where writing them counts.
    cases.push(sizes.causal_f32(2 * kilo, 128));
    cases.push(sizes.star(64 * kilo, 16 * kilo, 16 * kilo, 64 * kilo));
    cases.extend([1, 9, 16].map(|query_len| sizes.query(1, query_len, 128 * kilo, 128)));
    cases
}

/// A variant with less than this median ratio to the first is worth its code.
const WORTH: f64 = 0.99;

/// Times every variant on every case and returns how many rows failed.
pub fn run<B: Bench>(
    backend: &B,
    effort: &Effort,
    cases: &[Case],
    results: &Results,
    deadline: Option<Instant>,
) -> std::result::Result<usize, Failure> {
    println!("{:60} {:20} {:>10} {:>7} {:>15}", "", "variant", "ms", "ratio", "range");
    let (mut failed, mut decisions) = (0, Vec::new());
    for case in cases {
        let rows = if passed(deadline) {
            vec![error_row(case, "all", NOT_RUN)]
        } else {
            compare(backend, effort, case)
        };
        for row in &rows {
            failed += usize::from(row["error"].is_string());
            println!("{}", line(row));
            results.append(row)?;
        }
        if let Some(decision) = decide(case, &rows) {
            results.append(&decision)?;
            decisions.push(decision);
        }
    }
    println!("\nkeep");
    for decision in &decisions {
        let text = |key: &str| decision[key].as_str().unwrap_or_default().to_string();
        println!("{:60} {:20} {}", text("label"), text("keep"), text("why"));
    }
    Ok(failed)
}

/// A row for each variant that changes this case.
fn compare<B: Bench>(backend: &B, effort: &Effort, case: &Case) -> Vec<Value> {
    let Work::Attention(call) = &case.work else { return Vec::new() };
    let properties = backend.device().properties();
    let (mut names, mut plans, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for (name, plan) in planned(&properties, call) {
        match plan {
            Ok(plan) => {
                names.push(name);
                plans.push(plan);
            }
            Err(error) => rows.push(error_row(case, name, &error.to_string())),
        }
    }
    let times = launch::with_launcher(backend, effort, call, &plans, |launch| {
        alternate(backend, effort, plans.len(), launch)
    });
    match times {
        Err(error) => rows.extend(names.iter().map(|name| error_row(case, name, &error.to_string()))),
        Ok(times) => {
            for ((name, plan), rounds) in names.iter().zip(&plans).zip(&times) {
                // Round by round: what slows a round slows all its variants.
                let ratios = rounds.iter().zip(&times[0]).map(|(this, first)| this / first).collect();
                let mut row = json!({ "kind": "variant", "label": case.label, "variant": name });
                row["ratio"] = Times::new(ratios).describe();
                let figures = Figures { times: Times::new(rounds.clone()), flops: plan.flops(), bytes: 0 };
                figures.describe(&Rates::default(), &mut row);
                rows.push(row);
            }
        }
    }
    rows
}

fn error_row(case: &Case, variant: &str, error: &str) -> Value {
    json!({ "kind": "variant", "label": case.label, "variant": variant, "error": error })
}

/// Which variant of a case to keep: the one of the least median, if it was faster in every round.
fn decide(case: &Case, rows: &[Value]) -> Option<Value> {
    let median = |row: &Value| row["ratio"]["median"].as_f64();
    let best = rows
        .iter()
        .filter(|row| median(row).is_some())
        .min_by(|a, b| median(a).unwrap_or(f64::NAN).total_cmp(&median(b).unwrap_or(f64::NAN)))?;
    let first = rows.iter().find(|row| median(row).is_some())?;
    let most = best["ratio"]["most"].as_f64().unwrap_or(f64::NAN);
    let better = median(best).is_some_and(|ratio| ratio < WORTH) && most < 1.0;
    let (keep, why) = if better {
        (best, format!("{:.3} of the default's time, at most {most:.3}", median(best).unwrap_or(f64::NAN)))
    } else {
        (first, "no variant is faster in every round".to_string())
    };
    Some(json!({ "kind": "decision", "label": case.label, "keep": keep["variant"], "why": why }))
}

fn line(row: &Value) -> String {
    let text = |key: &str| row[key].as_str().unwrap_or_default();
    let (label, variant) = (text("label"), text("variant"));
    if let Some(error) = row["error"].as_str() {
        return format!("{label:60} {variant:20} {error}");
    }
    let number = |key: &str, of: &str| row[key][of].as_f64().unwrap_or(f64::NAN);
    let (ms, ratio) = (number("ms", "median"), number("ratio", "median"));
    let range = format!("{:.3}-{:.3}", number("ratio", "least"), number("ratio", "most"));
    format!("{label:60} {variant:20} {ms:10.4} {ratio:7.3} {range:>15}")
}
