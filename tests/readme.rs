//! The README shows what is compiled and run.

#[test]
fn the_readme_quotes_the_example() {
    let readme = include_str!("../README.md");
    let quoted = readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next());
    assert_eq!(quoted, Some(include_str!("../examples/two_phases.rs")));
}

#[test]
fn the_example_is_short() {
    assert!(include_str!("../examples/two_phases.rs").lines().count() <= 60);
}
