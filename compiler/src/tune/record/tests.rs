//! Records survive being written and read, and say what is wrong with them.

use super::*;
use proptest::prelude::*;

const GOOD: &str = r#"
version = 1
moec = "0.1.0"
threads = 2
[machine]
cpu = "AMD EPYC, family 25 model 17"
features = ["avx2", "fma"]
caches = [32768, 1048576]
[limits]
dots = 460e9
fmas = 1e11
read = 5e10
[team]
best = 1
measured = [{ threads = 2, decode = 0.02, prefill = 2.5 }, { threads = 1, decode = 0.019, prefill = 4.9 }]
[steps]
layers = 2
[[steps.measured]]
tokens = 1
default = 0.011
tuned = 0.0105
[[steps.measured]]
tokens = 64
default = 0.0412
tuned = 0.0405
[[product]]
format = "q4"
k = 4096
epilogue = "silu"
rows = [2, 4]
unroll = [1, 2]
prefetch = [1024, 0]
streams = [0, 4]
block = 4
activation_bytes = 2097152
ahead = true
measured = [{ step = 512, tokens = 128, default_share = 0.71, tuned_share = 0.74 }]
"#;

/// The error of the good record with `from` replaced by `to`.
fn wrong(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    Record::parse(&GOOD.replacen(from, to, 1), "r.toml").expect_err(to).to_string()
}

#[test]
fn a_record_survives_being_written_and_read() {
    let record = Record::parse(GOOD, "r.toml").unwrap();
    let shape = ProductShape { format: Format::Q4, k: 4096, epilogue: Epilogue::Gated(Activation::Silu) };
    let found = &record.products[&shape];
    assert_eq!(found.tuning.kernel(2), MatmulTuning { tiles: 4, unroll: 2, prefetch: Prefetch::Next(4) });
    assert_eq!(found.tuning.kernel(1).prefetch, Prefetch::Ahead(1024));
    let steps = record.steps.as_ref().unwrap();
    assert_eq!((steps.layers, steps.measured.len()), (2, 2));
    assert_eq!(steps.measured[1], StepTime { tokens: 64, default: 0.0412, tuned: 0.0405 });
    assert_eq!(Record::parse(&record.to_toml(), "r.toml").unwrap(), record);
    let none = Record { steps: None, ..record };
    assert_eq!(Record::parse(&none.to_toml(), "r.toml").unwrap(), none);
}

#[test]
fn errors_name_the_key() {
    for (from, to, key) in [
        ("rows = [2, 4]", "rows = [2, 3]", "`product[0].rows[1]`: 3 is none of 1, 2, 4, 8"),
        ("rows = [2, 4]", "rows = [2, -4]", "`product[0].rows[1]`"),
        ("rows = [2, 4]", "rows = []", "`product[0].rows`: 0 numbers"),
        ("unroll = [1, 2]", "unroll = [1]", "`product[0].unroll`: 1 numbers, and `rows` has 2"),
        ("unroll = [1, 2]", "unroll = [1, 0]", "`product[0].unroll[1]`: 0 is not within 1 and 4"),
        ("prefetch = [1024, 0]", "prefetch = [1, 0]", "`product[0].prefetch[0]`"),
        ("prefetch = [1024, 0]", "prefetch = \"far\"", "`product[0].prefetch`"),
        ("streams = [0, 4]", "streams = [0, 100]", "`product[0].streams[1]`: 100 is not within 1 and 16"),
        ("streams = [0, 4]", "streams = [4, 0]", "`product[0].streams[0]`: kernel 0 prefetches 1024 bytes ahead"),
        ("block = 4", "block = 0", "`product[0].block`: 0 is not within 1 and 64"),
        ("block = 4", "blocks = 4", "`product[0].blocks`"),
        ("k = 4096", "k = 99999999999999999", "`product[0].k`"),
        ("\"q4\"", "\"q5\"", "`product[0].format`: there is no `q5`"),
        ("\"silu\"", "\"relu\"", "`product[0].epilogue`"),
        ("\"fma\"", "\"mmx\"", "`machine.features[1]`: no feature is named `mmx`"),
        ("read = 5e10", "read = nan", "`limits.read`"),
        ("threads = 2", "threads = true", "`threads`"),
        ("best = 1", "best = 3", "`team.best`: 3 is not within 1 and 2"),
        ("decode = 0.019", "decode = 0.0", "`team.measured[1].decode`: 0 is no time; it must be above 0"),
        ("prefill = 4.9", "prefill = inf", "`team.measured[1].prefill`: inf is no time; it must be above 0"),
        ("{ threads = 1,", "{ threads = 0,", "`team.measured[1].threads`: 0 is not within 1 and 2"),
        ("layers = 2", "layers = 0", "`steps.layers`: 0 is not within 1 and 65536"),
        ("layers = 2", "", "`steps`: missing field `layers`"),
        ("tokens = 64", "tokens = 0", "`steps.measured[1].tokens`: 0 is not within 1 and 512"),
        ("default = 0.0412", "default = -1.0", "`steps.measured[1].default`: -1 is no time; it must be above 0"),
        ("tuned = 0.0105", "tuned = nan", "`steps.measured[0].tuned`: NaN is no time; it must be above 0"),
        ("version = 1", "version = 2", "version 2, and this moec reads version 1"),
        ("version = 1", "", "version no number"),
        ("[machine]", "[machine", "is not TOML"),
    ] {
        let error = wrong(from, to);
        assert!(error.contains("r.toml") && error.contains(key), "{to}: {error}");
    }
}

#[test]
fn two_entries_for_one_shape_are_refused() {
    let (_, product) = GOOD.split_once("[[product]]").unwrap();
    let error = Record::parse(&format!("{GOOD}[[product]]{product}"), "r.toml").unwrap_err().to_string();
    assert!(error.contains("`product[1]`: there is another for q4 k=4096 silu"), "{error}");
}

proptest! {
    #[test]
    fn garbled_records_are_errors_or_records(at in 0..GOOD.len(), length in 0..40usize, by in "[ -~\n]{0,6}") {
        let end = (at + length).min(GOOD.len());
        let text = format!("{}{by}{}", &GOOD[..at], &GOOD[end..]);
        if let Ok(record) = Record::parse(&text, "r.toml") {
            prop_assert_eq!(&Record::parse(&record.to_toml(), "r.toml").unwrap().products, &record.products);
        }
    }
}
