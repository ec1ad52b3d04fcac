//! No module of the library uses one above it.

use std::collections::BTreeMap;
use std::path::Path;

/// The modules from low to high. A module may use those of the levels below its own.
const LEVELS: [&[&str]; 9] = [
    &["error", "element", "tensor", "mask", "config"],
    &["simd"],
    &["layout", "batch", "scales", "merge"],
    &["inputs", "append"],
    &["schedule", "backend"],
    &["cpu", "cuda"],
    &["kv"],
    &["comm"],
    &["candle"],
];

/// The lowest level is one thing in five files, which may use each other.
const TOGETHER: usize = 0;

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|modules| modules.contains(&module))
}

fn is_allowed(from: &str, to: &str) -> bool {
    match (level(from), level(to)) {
        (Some(above), Some(below)) => from == to || above > below || (above, below) == (TOGETHER, TOGETHER),
        _ => false,
    }
}

/// Code without comments, and with strings and characters emptied.
fn code_of(source: &str) -> String {
    let (mut code, mut rest) = (String::new(), source);
    while let Some(first) = rest.chars().next() {
        let raw = rest.strip_prefix('r').map(|after| after.trim_start_matches('#'));
        let starts_a_word = !code.ends_with(|last: char| last.is_alphanumeric() || last == '_');
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if starts_a_word && raw.is_some_and(|after| after.starts_with('"')) {
            let hashes = rest.find('"').unwrap_or(1) - 1;
            let end = format!("\"{}", "#".repeat(hashes));
            rest[hashes + 2..].find(&end).map_or(rest.len(), |at| hashes + 2 + at + end.len())
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' && is_character(rest) {
            quoted(rest, '\'')
        } else {
            code.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        code.push(' ');
        rest = &rest[skipped..];
    }
    code
}

/// Bytes of the comment that a text starts with. Comments nest.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match &text.as_bytes()[at..(at + 2).min(text.len())] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Bytes of the literal that a text starts with.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Whether a quote starts a character, not the name of a lifetime.
fn is_character(text: &str) -> bool {
    let mut after = text.chars().skip(1);
    after.next() == Some('\\') || after.next() == Some('\'')
}

/// Words and signs; `::` is one sign.
fn tokens(code: &str) -> Vec<&str> {
    let (mut tokens, mut rest) = (Vec::new(), code.trim_start());
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let len = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    tokens
}

/// Where the bracket at `open` closes, or the end.
fn closing(tokens: &[&str], open: usize) -> usize {
    let mut depth = 0;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match *token {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    tokens.len()
}

/// The first names of what stands behind `::` at `at`: one, or those of a group.
fn first_names<'a>(tokens: &[&'a str], at: usize) -> Vec<&'a str> {
    match tokens.get(at) {
        Some(&"{") => {
            let (end, mut names, mut next) = (closing(tokens, at), Vec::new(), at + 1);
            while next < end {
                names.extend(first_names(tokens, next));
                // On to the comma behind this one, over groups within.
                while next < end && tokens[next] != "," {
                    next = if tokens[next] == "{" { closing(tokens, next) } else { next } + 1;
                }
                next += 1;
            }
            names
        }
        Some(name) => vec![name],
        None => Vec::new(),
    }
}

/// Whether a token stands in a group of a path, as `b` in `a::{b}`.
fn is_in_group(tokens: &[&str], at: usize) -> bool {
    let mut depth = 0;
    for open in (1..at).rev() {
        match tokens[open] {
            "}" | ")" | "]" => depth += 1,
            "(" | "[" | "{" if depth > 0 => depth -= 1,
            "{" => return tokens[open - 1] == "::",
            "(" | "[" => return false,
            _ => {}
        }
    }
    false
}

/// What a file of the library is made of.
struct File<'a> {
    /// Modules that it names as tests' own files.
    tests: Vec<String>,
    /// Names at the crate's root, and the line of tokens that they were found in.
    uses: Vec<(&'a str, String)>,
}

/// Reads the code of the module `path`, as `["cuda", "flash", "room"]`; none for the crate's root.
fn read<'a>(code: &'a str, path: &[&str]) -> File<'a> {
    let tokens = tokens(code);
    let mut file = File { tests: Vec::new(), uses: Vec::new() };
    // Ends of the inline modules around a place.
    let mut within: Vec<usize> = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        within.retain(|&end| at < end);
        if tokens[at..].starts_with(&["#", "[", "cfg", "(", "test", ")", "]"]) {
            // The item behind: to its end, be that a body or a semicolon.
            at += 7;
            let start = at;
            while at < tokens.len() && !["{", ";"].contains(&tokens[at]) {
                at = if ["(", "["].contains(&tokens[at]) { closing(&tokens, at) } else { at } + 1;
            }
            let item = &tokens[start..at.min(tokens.len())];
            if let Some(name) = item.iter().position(|&token| token == "mod").and_then(|at| item.get(at + 1))
            {
                file.tests.push((*name).to_owned());
            }
            at = if tokens.get(at) == Some(&"{") { closing(&tokens, at) } else { at } + 1;
            continue;
        }
        match tokens[at..] {
            ["mod", _, "{", ..] => {
                within.push(closing(&tokens, at + 2));
                at += 2;
            }
            ["$", "crate", ..] => at += 1,
            ["crate", "::", ..] => {
                let shown = tokens[at..(at + 8).min(tokens.len())].join(" ");
                file.uses.extend(first_names(&tokens, at + 2).into_iter().map(|name| (name, shown.clone())));
            }
            // Its level would be the group's as well.
            ["super", "::", ..] if is_in_group(&tokens, at) => {
                file.uses.push(("super", "super in a group".into()));
            }
            ["super", "::", ..] if at < 2 || tokens[at - 2..at] != ["super", "::"] => {
                let start = at;
                while tokens[at..].starts_with(&["super", "::", "super"]) {
                    at += 2;
                }
                let up = (at - start) / 2 + 1;
                if up == path.len() + within.len() {
                    let shown = tokens[start..(at + 8).min(tokens.len())].join(" ");
                    let names = first_names(&tokens, at + 2).into_iter();
                    file.uses.extend(names.map(|name| (name, shown.clone())));
                }
            }
            _ => {}
        }
        at += 1;
    }
    file
}

/// The module of each name at the crate's root.
fn root_names(lib: &str) -> BTreeMap<String, String> {
    let code = code_of(lib);
    let tokens = tokens(&code);
    let mut names = BTreeMap::new();
    for at in 0..tokens.len() {
        match tokens[at..] {
            ["mod", name, ";", ..] => drop(names.insert(name.to_owned(), name.to_owned())),
            ["use", module, "::", ..] => {
                for name in first_names(&tokens, at + 3) {
                    names.insert(name.to_owned(), module.to_owned());
                }
            }
            _ => {}
        }
    }
    names
}

/// The uses in one file that its module may not have.
fn wrong(root: &BTreeMap<String, String>, path: &[&str], source: &str) -> Vec<String> {
    let code = code_of(source);
    let mut wrong = Vec::new();
    for (name, shown) in read(&code, path).uses {
        let to = root.get(name).map_or(name, String::as_str);
        // From outside of the crate, under a name of its root.
        if to != "half" && !is_allowed(path[0], to) {
            wrong.push(format!("{}: {to} in `{shown}`", path.join("::")));
        }
    }
    wrong
}

/// The files of the library, tests' own left out, each with its module.
fn files() -> Vec<(Vec<String>, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut files, mut directories) = (Vec::new(), vec![src.clone()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let module = path.strip_prefix(&src).unwrap().with_extension("");
                let mut module: Vec<String> =
                    module.iter().map(|name| name.to_str().unwrap().to_owned()).collect();
                if module.last().is_some_and(|last| last == "mod") {
                    module.pop();
                }
                files.push((module, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let tests: Vec<Vec<String>> = files
        .iter()
        .flat_map(|(module, source)| {
            let (code, path) = (code_of(source), module.iter().map(String::as_str).collect::<Vec<_>>());
            let tests = read(&code, &path).tests;
            tests.into_iter().map(|name| [module.clone(), vec![name]].concat()).collect::<Vec<_>>()
        })
        .collect();
    files.retain(|(module, _)| module != &["lib"] && !tests.iter().any(|test| module.starts_with(test)));
    files
}

#[test]
fn no_module_uses_one_above_it() {
    let files = files();
    let root = root_names(include_str!("../src/lib.rs"));
    let modules: Vec<&str> = files.iter().map(|(module, _)| module[0].as_str()).collect();
    for module in LEVELS.concat() {
        assert!(modules.contains(&module), "no module {module}");
    }
    let found: Vec<String> = files
        .iter()
        .flat_map(|(module, source)| {
            wrong(&root, &module.iter().map(String::as_str).collect::<Vec<_>>(), source)
        })
        .collect();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn a_wrong_line_is_found() {
    let root = root_names(
        "mod backend; pub mod comm; mod tensor; mod batch; pub use batch::{Batch, Keys}; pub use half::f16;",
    );
    let found = |path: &[&str], source: &str| wrong(&root, path, source).len();
    let cuda = ["cuda", "flash", "room"];
    for planted in [
        "use crate::comm::Link;",
        "pub(crate) use crate::{Batch, comm::{Link, MergeWay}};",
        "use crate::{\n    Batch,\n    comm,\n};",
        "fn f() { let way = crate::comm::MergeWay::AllGather; }",
        "use super::super::super::comm::Link;",
        "use super::super::{super::comm::Link};",
        "mod inner { use super::super::super::super::comm::Link; }",
        "const QUOTE: char = '\"'; use crate::comm::Link; const END: char = '\"';",
        "fn f<'a>(x: &'a u8) { crate::comm::f(x) } fn g<'a>() {}",
        "use crate::no_such_name;",
        "#[cfg(test)]\nmod tests { use crate::comm::A; }\nuse crate::comm::Link;",
    ] {
        assert_eq!(found(&cuda, planted), 1, "{planted}");
    }
    for fine in [
        "use crate::{Batch, f16, tensor::Strided};",
        "use super::super::device::Device; use super::super::comm::NotTheCrates;",
        "mod inner { use super::super::super::comm::Link; }",
        "// use crate::comm::Link;\n/// [`x`](crate::comm::Link)\n/* crate::comm /* crate::comm */ crate::comm */",
        "const TEXT: &str = \"use crate::comm::Link; \\\" crate::comm\";",
        "const TEXT: &str = r#\"a \" crate::comm::Link\"#;",
        "#[cfg(test)]\nmod tests { use crate::comm::{A, B}; }",
        "#[cfg(test)]\nuse crate::comm::A;",
        "pub(crate) fn f() {} pub(in crate::cuda) fn g() {} macro_rules! m { () => { $crate::comm::x() } }",
    ] {
        assert_eq!(found(&cuda, fine), 0, "{fine}");
    }
    assert_eq!(found(&["comm", "merge"], "use crate::{backend, tensor, Keys};"), 0);
    assert_eq!(found(&["batch"], "use crate::backend::Backend; use super::comm::Link;"), 2);
    assert_eq!(found(&["cuda"], "use crate::cpu::flash;"), 1, "beside it is not below it");
    assert_eq!(read("#[cfg(test)] pub(crate) mod cases;", &["backend"]).tests, ["cases"]);
}
