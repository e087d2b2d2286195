//! Text from tokens, piece by piece: what is given out is never taken back, and is in the end what all ids at once
//! decode to.

use moec_runtime::{Matched, StopMatcher, Tokenizer};
use proptest::prelude::*;
use serde_json::json;
use std::sync::LazyLock;

/// The tokenizers to try, with the size of each vocabulary.
static TOKENIZERS: LazyLock<Vec<(&str, Tokenizer, u32)>> = LazyLock::new(|| {
    let byte_fallback = include_bytes!("data/byte_fallback_tokenizer.json");
    vec![
        ("byte fallback", Tokenizer::new(byte_fallback).unwrap(), 384),
        ("byte level", byte_level(), 300),
        ("metaspace", words("Metaspace"), 20),
        ("word piece", words("WordPiece"), 20),
        ("no decoder", words(""), 20),
    ]
});

/// A GPT-2 style tokenizer: a token for each byte, some for pieces of characters and of words, and special ones.
fn byte_level() -> Tokenizer {
    // GPT-2's printable stand-ins for bytes (bytes_to_unicode in its encoder.py).
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    let stand_in: Vec<char> = (0..256u32)
        .map(|b| {
            let code = if printable(b) { b } else { next };
            next += u32::from(!printable(b));
            char::from_u32(code).unwrap()
        })
        .collect();
    let piece = |bytes: &[u8]| bytes.iter().map(|b| stand_in[usize::from(*b)]).collect::<String>();
    let pieces = [
        piece(b" the"),
        piece(b"ing"),
        piece(&[0xf0, 0x9f]),
        piece(&[0x98, 0x80]),
        piece(&[0xe2, 0x82]),
        piece(&[0xac, b'a']),
        piece(&[b' ', 0xc3]),
        piece("\u{fffd}".as_bytes()),
        piece(b"\n\n"),
        piece(b"  "),
    ];
    let mut vocab: serde_json::Map<_, _> = (0..256).map(|b| (stand_in[b].to_string(), json!(b))).collect();
    vocab.extend(pieces.into_iter().enumerate().map(|(i, piece)| (piece, json!(256 + i))));
    let special = |id: u32| {
        json!({"id": id, "content": format!("<|{id}|>"), "special": true, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false})
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(298), special(299)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        // As files of the hub have it: it must not cut or fill anything here.
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 5}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "!"},
    });
    Tokenizer::new(tokenizer.to_string().as_bytes()).unwrap()
}

/// A vocabulary of words, with one of the library's decoders that look at neighbours.
fn words(decoder: &str) -> Tokenizer {
    let words = [
        "[UNK]", "▁", "▁▁", "▁a", "b", "▁he", "llo", "##ing", ".", ",", "n't", "'s", "▁é", "\u{fffd}", "do", "##", "!",
        "▁\n", "a", "[S]",
    ];
    let vocab: serde_json::Map<_, _> =
        words.iter().enumerate().map(|(i, word)| ((*word).to_owned(), json!(i))).collect();
    let decoder = match decoder {
        "Metaspace" => json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        "WordPiece" => json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        _ => json!(null),
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{"id": 19, "content": "[S]", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}],
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    });
    Tokenizer::new(tokenizer.to_string().as_bytes()).unwrap()
}

fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces
}

#[test]
fn characters_come_out_whole_and_early() {
    let tokenizer = &TOKENIZERS[1].1;
    // 😀 in two pieces, then é in two, then a byte that begins nothing.
    let found = pieces(tokenizer, &[72, 105, 258, 259, 0xc3, 0xa9, 0xff, 33]);
    assert_eq!(found, ["H", "i", "", "😀", "", "é", "", "\u{fffd}!", ""]);
    // A character that never ends is told at the end.
    assert_eq!(pieces(tokenizer, &[72, 258]), ["H", "", "\u{fffd}"]);
    // A token that ends one character and begins another thing.
    assert_eq!(pieces(tokenizer, &[260, 261, 33]), ["", "€a", "!", ""]);
}

#[test]
fn byte_tokens_wait_for_the_end_of_their_run() {
    let tokenizer = &TOKENIZERS[0].1;
    // é as two bytes; then a run that is not UTF-8 becomes one mark per byte.
    let b = tokenizer.encode("b", false).unwrap();
    let ids = [&[198, 172][..], &b, &[198], &b].concat();
    let found = pieces(tokenizer, &ids);
    assert_eq!(found.concat(), tokenizer.decode(&ids).unwrap());
    assert_eq!(found[..3], ["", "", "é b"]);
}

#[test]
fn settings_of_training_are_ignored() {
    let tokenizer = &TOKENIZERS[1].1;
    assert_eq!(tokenizer.encode("Hello", true).unwrap(), [72, 101, 108, 108, 111]);
    assert_eq!(tokenizer.encode("H", true).unwrap(), [72]);
    assert!(tokenizer.encode("", true).unwrap().is_empty());
}

#[test]
fn what_is_no_tokenizer_is_an_error() {
    for text in ["", "{}", "{\"model\": {}}", "[1, 2"] {
        let error = Tokenizer::new(text.as_bytes()).err().unwrap().to_string();
        assert!(error.starts_with("the model's tokenizer failed: "), "{error}");
    }
}

#[test]
fn long_texts_take_linear_time() {
    let tokenizer = &TOKENIZERS[0].1;
    let ids: Vec<u32> = (0..40_000).map(|i| 260 + i * 7919 % 120).collect();
    let started = std::time::Instant::now();
    let text = pieces(tokenizer, &ids).concat();
    assert!(text == tokenizer.decode(&ids).unwrap());
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

#[test]
fn stop_strings_are_found_across_pieces() {
    let stops = ["\nUser:".to_owned(), String::new(), "END".to_owned()];
    let mut matcher = StopMatcher::new(&stops);
    let no = |text: &str| Matched { text: text.into(), stopped: false };
    assert_eq!(matcher.push("Hello\n"), no("Hello"));
    assert_eq!(matcher.push("Us"), no(""));
    assert_eq!(matcher.push("a\n\nUse"), no("\nUsa\n"));
    assert_eq!(matcher.push("r:x END"), Matched { text: String::new(), stopped: true });

    let mut matcher = StopMatcher::new(&stops);
    assert_eq!(matcher.push("aEN"), no("a"));
    assert_eq!(matcher.finish(), "EN");
    // The one that is complete first, as when the text comes letter by letter; of two, the longer one.
    let mut matcher = StopMatcher::new(&["b".into(), "abc".into()]);
    assert_eq!(matcher.push("xabc"), Matched { text: "xa".into(), stopped: true });
    let mut matcher = StopMatcher::new(&["bc".into(), "abc".into()]);
    assert_eq!(matcher.push("xabc"), Matched { text: "x".into(), stopped: true });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_are_the_text_of_all_ids(which in 0..3usize, raw in prop::collection::vec(0u32..400, 0..40)) {
        let (name, tokenizer, vocab) = &TOKENIZERS[which];
        // Mostly tokens of the vocabulary, and some ids that do not exist.
        let ids: Vec<u32> = raw.iter().map(|id| if *id == 399 { 5000 } else { id % vocab }).collect();
        let found = pieces(tokenizer, &ids);
        prop_assert_eq!(found.concat(), tokenizer.decode(&ids).unwrap(), "{}", name);
    }

    /// Decoders that rewrite what they have said cannot be streamed exactly, but nothing fails or is lost at the end.
    #[test]
    fn decoders_that_change_their_mind_do_no_harm(raw in prop::collection::vec(0u32..20, 0..40)) {
        for (_, tokenizer, _) in &TOKENIZERS[3..] {
            pieces(tokenizer, &raw);
        }
    }

    #[test]
    fn matching_in_pieces_is_matching_at_once(
        text in "[ab\n]{0,30}", cuts in prop::collection::vec(0usize..30, 0..8), stops in prop::collection::vec("[ab\n]{0,4}", 0..3),
    ) {
        let expected = (0..=text.len()).find_map(|end| {
            let start = |stop: &String| text[..end].ends_with(stop.as_str()).then(|| end - stop.len());
            stops.iter().filter(|stop| !stop.is_empty()).filter_map(start).min()
        });
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let mut matcher = StopMatcher::new(&stops);
        let mut found = String::new();
        let mut stopped = false;
        for cut in cuts.windows(2) {
            let matched = matcher.push(&text[cut[0]..cut[1]]);
            found.push_str(&matched.text);
            stopped = matched.stopped;
            if stopped {
                break;
            }
        }
        if !stopped {
            found.push_str(&matcher.finish());
        }
        prop_assert_eq!(stopped, expected.is_some());
        prop_assert_eq!(found, &text[..expected.unwrap_or(text.len())]);
    }
}

/// A text's tokens spell its bytes, and a text cut anywhere is streamed as if it were not.
#[test]
fn tokens_spell_the_text_and_continuations_keep_their_space() {
    let text = "Free software, naïvely: 2 + 2 = 5 — 😀 for the good of the people";
    for (name, tokenizer, _) in &TOKENIZERS[..2] {
        let ids = tokenizer.encode(text, false).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).collect();
        assert_eq!(String::from_utf8(bytes).unwrap().trim_start(), text, "{name}");
        let whole = tokenizer.decode(&ids).unwrap();
        for cut in 1..ids.len() {
            let before = tokenizer.decode(&ids[..cut]).unwrap();
            if before.contains(char::REPLACEMENT_CHARACTER) {
                continue;
            }
            let mut stream = tokenizer.stream_after(&ids[..cut]).unwrap();
            let mut after = String::new();
            for id in &ids[cut..] {
                after += &stream.push(*id).unwrap();
            }
            after += &stream.finish().unwrap();
            assert_eq!(before + &after, whole, "{name} {cut}");
        }
        assert_eq!(tokenizer.token_bytes(5000), b"", "{name}");
    }
    let (_, tokenizer, _) = &TOKENIZERS[0];
    assert_eq!(
        (tokenizer.name(2).as_deref(), tokenizer.id("</s>"), tokenizer.token_bytes(2)),
        (Some("</s>"), Some(2), vec![])
    );
}
