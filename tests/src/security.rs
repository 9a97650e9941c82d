//! That the tests which SECURITY.md names are there.

use std::{fs, path::Path};

#[test]
fn each_test_that_security_md_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("../SECURITY.md")).expect("SECURITY.md");
    let mut count = 0;
    for (file, name) in text.split('`').skip(1).step_by(2).filter_map(|word| word.split_once("::")) {
        if name == "…" {
            continue;
        }
        let path = root.join("tests").join(format!("{file}.rs"));
        let code = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(code.contains(&format!("fn {name}(")), "{} has no {name}", path.display());
        count += 1;
    }
    assert!(count > 30, "{count} are named");
}
