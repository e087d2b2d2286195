//! Expert statistics count what was chosen, and a payload that is laid out by them gives the same bits.

use moec::expert_profile::ExpertProfile;
use moec::pipeline::Options;
use moec_tests::{Golden, build_with, models};

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn experts_are_counted_and_laid_out_by_heat_without_a_changed_bit() {
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let file = directory.path().join("stats.json");
    let stats = file.to_str().expect("a plain path");
    for (name, quant, disabled) in [
        ("mixtral-a", "none", &[][..]),
        ("mixtral-a", "q4", &[]),
        ("qwen2-moe-a", "q8", &[]),
        // Without the specialized dispatch every token goes to its experts by itself.
        ("mixtral-a", "q8", &["specialize_dispatch"]),
        ("mixtral-a", "q8", &["fuse_gate_up", "fuse_residual", "specialize_dispatch"]),
    ] {
        let path = models().into_iter().find(|path| path.ends_with(name)).unwrap_or_else(|| panic!("no {name}"));
        let options = Options {
            quant: quant.parse().expect("a --quant option"),
            disabled: disabled.iter().map(|pass| pass.parse().expect("a pass")).collect(),
            ..Options::default()
        };
        let golden = Golden::read(&path);
        let plain = build_with(&path, &options);
        let ids = &golden.full_ids;
        plain.run(&["score", "--tokens", &list(ids), "--expert-stats", stats]);
        let profile = ExpertProfile::read(&file).unwrap_or_else(|e| panic!("{e}"));

        // The counts are those of the routes that `logits` gives.
        let expected = plain.logits(ids, &[]);
        let counts = &profile.stats.counts;
        assert_eq!((profile.stats.tokens, counts.len()), (ids.len() as u64, expected.experts.len()), "{name}");
        for (layer, (counts, chosen)) in counts.iter().zip(&expected.experts).enumerate() {
            for (expert, count) in counts.iter().enumerate() {
                let wanted = chosen.iter().filter(|&&e| e as usize == expert).count();
                assert_eq!(*count, wanted as u64, "{name} {quant}: layer {layer}, expert {expert}");
            }
        }

        let by_heat = build_with(&path, &Options { expert_profiles: vec![profile.clone()], ..options });
        for more in [&[][..], &["--threads", "3"], &["--chunk", "1"], &["--chunk", "7"]] {
            let found = by_heat.logits(ids, more);
            assert!(expected.bits() == found.bits(), "{name} {quant} {disabled:?} {more:?}: other logits");
            assert_eq!(expected.experts, found.experts, "{name} {quant}: experts keep their numbers");
        }
        // Counting by the new executable gives the same file: what is counted does not depend on the layout.
        by_heat.run(&["score", "--tokens", &list(ids), "--expert-stats", stats]);
        assert_eq!(ExpertProfile::read(&file).unwrap_or_else(|e| panic!("{e}")), profile);
    }
}

#[test]
fn a_model_without_experts_has_nothing_to_count() {
    let path = models().into_iter().find(|path| path.ends_with("llama-c")).expect("the model");
    let built = build_with(&path, &Options::default());
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let file = directory.path().join("stats.json");
    let mut command = std::process::Command::new(&built.path);
    command.args(["generate", "--tokens", "1", "--max-tokens", "1", "--expert-stats"]).arg(&file);
    let done = moec::emit::executable::output_when_closed(&mut command).expect("the executable starts");
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("no experts"), "{said}");
}
