//! What the steps took, as a table.

use crate::check::Errors;
use crate::table::{table, time};

/// A step's time, work, and errors.
pub struct Step {
    pub name: String,
    pub seconds: f64,
    pub flops: u64,
    pub bytes: usize,
    pub errors: Option<Errors>,
}

/// Prints the table. Whether all errors were within the bound.
pub fn report(steps: &[Step]) -> bool {
    let mut rows = vec![
        ["step", "time", "TFLOP/s", "GB/s", "max error", "bound", "lse error"].map(String::from).to_vec(),
    ];
    for step in steps {
        let rate = |amount: f64, unit: f64| format!("{:.3}", amount / step.seconds / unit);
        let mut row = vec![
            step.name.clone(),
            time(step.seconds),
            if step.flops == 0 { "-".into() } else { rate(step.flops as f64, 1e12) },
            rate(step.bytes as f64, 1e9),
        ];
        match &step.errors {
            Some(errors) => row.extend([errors.out, errors.bound(), errors.lse].map(|x| format!("{x:.1e}"))),
            None => row.extend(["-"; 3].map(String::from)),
        }
        rows.push(row);
    }
    print!("{}", table(&rows));
    let within = steps.iter().filter_map(|step| step.errors).all(|errors| errors.within());
    let checked: usize = steps.iter().filter_map(|step| step.errors).map(|errors| errors.rows).sum();
    println!(
        "{checked} rows of heads compared with the oracle: errors {}",
        if within { "within the bound" } else { "ABOVE THE BOUND" }
    );
    within
}
