//! Sessions over a hand-written model: whatever the threads, chunks, forks and windows, the logits are the same.

mod fake;

use fake::{Shape, expected_logits};
use moec_abi::PAGE_TOKENS;
use moec_runtime::kv::Sequence;
use moec_runtime::scheduler::Pooling;
use moec_runtime::{
    Descriptor, Error, LogitRows, Logits, Model, Options, Part, PayloadSource, PoolOptions, Sampling, Session,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn open(shape: &Shape, threads: usize) -> Arc<Model> {
    let dir = tempfile::tempdir().unwrap();
    let payload = PayloadSource::File(fake::write_payload(shape, dir.path()));
    let pool = PoolOptions { threads: Some(threads), pin_caller: false };
    // SAFETY: the fake model's descriptor is as a generated one.
    let descriptor = unsafe { Descriptor::new(fake::descriptor(shape)) }.unwrap();
    Model::open(descriptor, &Options { payload, pool, ..Options::default() }).unwrap()
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 7919 + i * i * 31 + 5) as u32 % 384).collect()
}

/// All rows of logits, fed with chunks of `chunk`.
fn all_logits(session: &mut Session, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    session.set_chunk(chunk);
    let mut rows = Vec::new();
    session
        .feed_each(tokens, |i, row| {
            assert_eq!(i, rows.len());
            rows.push(row.to_vec());
        })
        .unwrap();
    rows
}

#[test]
fn logits_depend_on_nothing_but_tokens() {
    let tokens = tokens(300);
    for window in [0, 8, 64, 100] {
        let shape = Shape { window, ..Shape::default() };
        let expected: Vec<_> = (1..=tokens.len()).map(|n| expected_logits(&shape, &tokens[..n])).collect();
        for threads in [1, 2, 3] {
            let model = open(&shape, threads);
            assert_eq!(model.workers(), threads);
            for chunk in [1, 2, 7, 16, 1000] {
                let found = all_logits(&mut Session::new(&model), &tokens, chunk);
                assert!(found == expected, "window {window} threads {threads} chunk {chunk}");
            }
        }
    }
}

#[test]
fn only_the_rows_asked_for_are_computed() {
    let model = open(&Shape::default(), 2);
    let mut session = Session::new(&model);
    let tokens = tokens(40);
    session.feed(&tokens[..20], Logits::None).unwrap();
    assert_eq!(session.logits().len(), 0);
    session.feed(&tokens[20..39], Logits::Last).unwrap();
    assert_eq!(session.logits().len(), 1);
    assert_eq!(session.last_logits(), expected_logits(&Shape::default(), &tokens[..39]));
    session.feed(&tokens[39..], Logits::Last).unwrap();
    assert_eq!(session.last_logits(), expected_logits(&Shape::default(), &tokens));
    assert_eq!(session.tokens(), tokens);
    assert_eq!(session.room(), 960);
}

#[test]
fn rewinding_forgets() {
    let shape = Shape::default();
    let model = open(&shape, 2);
    let mut session = Session::new(&model);
    let a = tokens(200);
    session.feed(&a, Logits::None).unwrap();
    for back in [199, 128, 127, 64, 3, 0] {
        session.rewind(back).unwrap();
        let mut b = a[..back].to_vec();
        b.extend([9, 8, 7]);
        session.feed(&[9, 8, 7], Logits::Last).unwrap();
        assert_eq!(session.last_logits(), expected_logits(&shape, &b), "{back}");
        session.rewind(back).unwrap();
    }
    assert_eq!(model.pages().pages_in_use(), 0);
}

#[test]
fn rewinding_past_the_window_is_an_error_and_changes_nothing() {
    let shape = Shape { window: 10, ..Shape::default() };
    let model = open(&shape, 1);
    let mut session = Session::new(&model);
    let tokens = tokens(300);
    session.feed(&tokens, Logits::None).unwrap();
    assert!(model.pages().pages_in_use() <= Sequence::pages_for(300, 16, Some(10)));
    let error = session.rewind(100).unwrap_err();
    assert!(matches!(error, Error::Rewind { to: 100, .. }), "{error}");
    session.feed(&[1], Logits::Last).unwrap();
    let mut all = tokens.clone();
    all.push(1);
    assert_eq!(session.last_logits(), expected_logits(&shape, &all));
}

#[test]
fn forks_share_a_prefix_and_go_their_own_ways() {
    let shape = Shape::default();
    let model = open(&shape, 2);
    let mut first = Session::new(&model);
    let prefix = tokens(150);
    first.feed(&prefix, Logits::None).unwrap();
    let held = model.pages().pages_in_use();
    let mut forks: Vec<Session> = (0..4).map(|_| first.fork()).collect();
    assert_eq!(model.pages().pages_in_use(), held, "a fork takes no pages");
    for (i, fork) in forks.iter_mut().enumerate() {
        let own = [i as u32 + 20, 3, 1];
        fork.feed(&own, Logits::Last).unwrap();
        let mut all = prefix.clone();
        all.extend(own);
        assert_eq!(fork.last_logits(), expected_logits(&shape, &all));
    }
    // One written page each; the two full ones are shared.
    assert_eq!(model.pages().pages_in_use(), held + forks.len());
    first.feed(&[7], Logits::Last).unwrap();
    let mut all = prefix.clone();
    all.push(7);
    assert_eq!(first.last_logits(), expected_logits(&shape, &all));
    drop((first, forks));
    assert_eq!(model.pages().pages_in_use(), 0);
}

#[test]
fn one_step_serves_several_sequences() {
    let shape = Shape { window: 50, ..Shape::default() };
    let model = open(&shape, 3);
    let texts = [tokens(90), tokens(70)[3..].to_vec(), tokens(65)[1..].to_vec()];
    let mut sequences: Vec<Sequence> = (0..3).map(|_| Sequence::new(model.pages(), Some(50))).collect();
    let mut logits = LogitRows::default();
    // Ragged: 5, 4 and 3 tokens per step, until one text ends.
    for step in 0..16 {
        let mut parts: Vec<Part> = sequences
            .iter_mut()
            .zip(&texts)
            .enumerate()
            .map(|(i, (sequence, text))| {
                let count = 5 - i;
                let wanted = [Logits::Last, Logits::All, Logits::None][i];
                Part { sequence, tokens: &text[step * count..(step + 1) * count], logits: wanted }
            })
            .collect();
        model.step(&mut parts, &mut logits, None).unwrap();
        assert_eq!(logits.len(), 5);
        assert_eq!(logits.row(0), expected_logits(&shape, &texts[0][..(step + 1) * 5]));
        for row in 0..4 {
            assert_eq!(logits.row(1 + row), expected_logits(&shape, &texts[1][..step * 4 + row + 1]));
        }
    }
}

#[test]
fn routes_are_those_of_all_tokens_of_a_feed() {
    let model = open(&Shape::default(), 2);
    let mut session = Session::new(&model);
    session.record_routes(true).unwrap();
    let tokens = tokens(50);
    for chunk in [1, 16, 7] {
        session.rewind(0).unwrap();
        session.set_chunk(chunk);
        session.feed(&tokens, Logits::None).unwrap();
        let routes = session.routes().unwrap();
        assert_eq!((routes.tokens(), routes.layers, routes.per_token), (50, 2, 2));
        for layer in 0..2 {
            for (i, id) in tokens.iter().enumerate() {
                for k in 0..2 {
                    let found = (routes.experts[layer][2 * i + k], routes.weights[layer][2 * i + k]);
                    assert_eq!(found, fake::route(*id, layer, k));
                }
            }
        }
    }
    let dense = open(&Shape { experts: 0, ..Shape::default() }, 1);
    assert!(matches!(Session::new(&dense).record_routes(true), Err(Error::NoRoutes)));
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_done() {
    let shape = Shape { context: 130, ..Shape::default() };
    let model = open(&shape, 1);
    let mut session = Session::new(&model);
    let error = session.feed(&tokens(131), Logits::Last).unwrap_err();
    assert!(matches!(error, Error::ContextFull { tokens: 131, context: 130 }), "{error}");
    let error = session.feed(&[5, 384], Logits::Last).unwrap_err();
    assert!(matches!(error, Error::Token { id: 384, vocab: 384 }), "{error}");
    assert!(session.tokens().is_empty());
    session.feed(&tokens(130), Logits::Last).unwrap();
    assert_eq!(session.room(), 0);
    assert!(matches!(session.feed(&[1], Logits::Last), Err(Error::ContextFull { .. })));
    session.feed(&[], Logits::Last).unwrap();

    let mut sequence = Sequence::new(model.pages(), None);
    let part = Part { sequence: &mut sequence, tokens: &[1; 17], logits: Logits::None };
    let error = model.step(&mut [part], &mut LogitRows::default(), None).unwrap_err();
    assert!(matches!(error, Error::StepSize { tokens: 17, max: 16 }), "{error}");
}

#[test]
fn an_interrupt_ends_between_chunks() {
    let model = open(&Shape::default(), 2);
    let mut session = Session::new(&model);
    let flag = Arc::new(AtomicBool::new(false));
    session.set_interrupt(flag.clone());
    session.set_chunk(10);
    let tokens = tokens(100);
    let mut seen = 0;
    let result = session.feed_each(&tokens, |i, _| {
        seen = i + 1;
        flag.store(i >= 25, Ordering::Relaxed);
    });
    assert!(matches!(result, Err(Error::Interrupted)));
    assert_eq!((seen, session.tokens().len()), (30, 30));
    flag.store(false, Ordering::Relaxed);
    session.feed(&tokens[30..], Logits::Last).unwrap();
    assert_eq!(session.last_logits(), expected_logits(&Shape::default(), &tokens));
}

#[test]
fn sessions_of_one_model_on_several_threads() {
    let shape = Shape::default();
    let model = open(&shape, 2);
    std::thread::scope(|scope| {
        for start in 0..4 {
            let (model, shape) = (&model, &shape);
            scope.spawn(move || {
                let tokens = tokens(120)[start..].to_vec();
                let mut session = Session::new(model);
                for (i, token) in tokens.iter().enumerate() {
                    session.feed(&[*token], Logits::Last).unwrap();
                    assert_eq!(session.last_logits(), expected_logits(shape, &tokens[..=i]));
                }
            });
        }
    });
}

#[test]
fn the_cache_must_fit_into_memory() {
    // A context that no machine has memory for: pages are still taken one by one, and a long text is refused at once.
    let shape = Shape { context: u32::MAX, ..Shape::default() };
    let model = open(&shape, 1);
    let mut session = Session::new(&model);
    session.feed(&[1, 2, 3], Logits::Last).unwrap();
    assert_eq!(model.pages().pages_in_use(), 1);
    let available = moec_runtime::memory::Memory::now().total as usize;
    let tokens = (available / (PAGE_TOKENS * 8) + 1) * PAGE_TOKENS;
    if tokens < u32::MAX as usize - 3 {
        let error = session.check_room(tokens).unwrap_err();
        assert!(matches!(error, Error::Memory { .. }), "{error}");
    }
}

#[test]
fn forks_have_the_logits_and_rewinding_loses_them() {
    let shape = Shape::default();
    let model = open(&shape, 2);
    let mut session = Session::new(&model);
    let tokens = tokens(70);
    session.feed(&tokens, Logits::Last).unwrap();
    let mut fork = session.fork();
    let expected = expected_logits(&shape, &tokens);
    assert_eq!(fork.last_logits(), expected);
    fork.feed(&[3], Logits::Last).unwrap();
    assert_eq!(session.last_logits(), expected, "the fork writes to rows of its own");
    session.rewind(70).unwrap();
    assert_eq!(session.last_logits(), expected);
    session.rewind(69).unwrap();
    assert!(session.try_last_logits().is_none());
    assert!(matches!(session.rewind(70), Err(Error::RewindForward { to: 70, tokens: 69 })));
    session.feed(&tokens[69..], Logits::Last).unwrap();
    assert_eq!(session.last_logits(), expected);
}

#[test]
fn a_saved_session_goes_on_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("session");
    for window in [0, 10, 64, 100] {
        let shape = Shape { window, ..Shape::default() };
        let model = open(&shape, 2);
        for count in [0, 1, 63, 64, 65, 300] {
            let mut all = tokens(count);
            let mut session = Session::new(&model);
            session.feed(&all, Logits::Last).unwrap();
            session.save(&path).unwrap();
            let other = open(&shape, 1);
            let mut loaded = Session::load(&other, &path).unwrap();
            assert_eq!(loaded.tokens(), all);
            assert_eq!(loaded.try_last_logits(), session.try_last_logits());
            for session in [&mut session, &mut loaded] {
                session.feed(&[5, 6], Logits::Last).unwrap();
            }
            all.extend([5, 6]);
            assert_eq!(loaded.last_logits(), expected_logits(&shape, &all), "window {window}, {count} tokens");
            assert_eq!(loaded.last_logits(), session.last_logits());
            drop(loaded);
            assert_eq!(other.pages().pages_in_use(), 0);
        }
        // A fork that went back has pages that reach beyond its end, and no logits.
        let mut session = Session::new(&model);
        session.feed(&tokens(130), Logits::Last).unwrap();
        session.rewind(129).unwrap();
        session.save(&path).unwrap();
        let mut loaded = Session::load(&model, &path).unwrap();
        assert!(loaded.try_last_logits().is_none());
        loaded.feed(&tokens(130)[129..], Logits::Last).unwrap();
        assert_eq!(loaded.last_logits(), expected_logits(&shape, &tokens(130)));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "temporary files are gone");
}

#[test]
fn damaged_and_foreign_sessions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("session");
    let shape = Shape { window: 100, ..Shape::default() };
    let model = open(&shape, 1);
    let mut session = Session::new(&model);
    session.feed(&tokens(200), Logits::Last).unwrap();
    session.save(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Session::load(&model, &path).map(|_| ())
    };
    load(&good).unwrap();
    // Every byte of the header and a sample of the others; and every length.
    for at in (0..88).chain((88..good.len()).step_by(37)) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x41;
        let error = load(&bytes).expect_err(&format!("byte {at} is changed"));
        let named = error.to_string().contains("session");
        assert!(named && !matches!(error, Error::SessionFile { .. }), "byte {at}: {error}");
    }
    for length in (0..200).chain((200..good.len()).step_by(97)) {
        assert!(matches!(load(&good[..length]), Err(Error::SessionDamaged { .. })), "{length}");
    }
    assert!(matches!(load(&[&good[..], &[0]].concat()), Err(Error::SessionDamaged { .. })));
    assert_eq!(model.pages().pages_in_use(), session.fork().tokens().len().div_ceil(PAGE_TOKENS) - 1);

    std::fs::write(&path, &good).unwrap();
    for other in [Shape { window: 90, ..shape.clone() }, Shape { vocab: 300, ..shape.clone() }] {
        let error = Session::load(&open(&other, 1), &path).err().unwrap();
        assert!(matches!(error, Error::SessionForeign { .. }), "{error}");
    }
    let error = Session::load(&model, &dir.path().join("nothing")).err().unwrap();
    assert!(error.to_string().starts_with("cannot read the session "), "{error}");
    let error = session.save(&dir.path().join("no/such/place")).err().unwrap();
    assert!(error.to_string().starts_with("cannot write the session "), "{error}");
}

/// The tokens that greedy sampling gives after `prompt`, `count` of them.
fn greedy(shape: &Shape, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..count {
        let logits = expected_logits(shape, &all);
        let best = (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best }).unwrap();
        all.push(best as u32);
    }
    all.split_off(prompt.len())
}

#[test]
fn a_session_is_an_iterator_of_tokens() {
    let shape = Shape { context: 120, eos: Vec::new(), ..Shape::default() };
    let model = open(&shape, 2);
    let prompt = tokens(60);
    let expected = greedy(&shape, &prompt, 60);
    let mut session = Session::new(&model);
    assert!(matches!(session.generate(&[], Sampling::default()), Err(Error::NoLogits)));
    let mut generation = session.generate(&prompt, Sampling::default()).unwrap();
    let first: Vec<u32> = generation.by_ref().take(10).map(Result::unwrap).collect();
    assert_eq!(first, expected[..10]);
    generation.finish().unwrap();
    assert_eq!(session.tokens(), [&prompt[..], &expected[..10]].concat());
    // Goes on where it was, to the end of the context.
    let rest: Vec<u32> = session.generate(&[], Sampling::default()).unwrap().map(Result::unwrap).collect();
    assert_eq!(rest, expected[10..]);
    assert!(session.generate(&[], Sampling::default()).unwrap().next().is_none());
    assert!(matches!(session.generate(&[1], Sampling::default()), Err(Error::ContextFull { .. })));

    // The end token is not given out.
    let ending = Shape { eos: vec![expected[7]], context: 500, ..shape };
    let stop = expected.iter().position(|id| *id == expected[7]).unwrap();
    let model = open(&ending, 1);
    let mut session = Session::new(&model);
    let mut generation = session.generate(&prompt, Sampling::default()).unwrap();
    let found: Vec<u32> = generation.by_ref().map(Result::unwrap).collect();
    assert_eq!(found, expected[..stop]);
    assert!(generation.next().is_none());
}

#[test]
fn embeddings_depend_on_the_tokens_only() {
    for window in [0, 30] {
        let shape = Shape { window, ..Shape::default() };
        let tokens = tokens(100);
        let hidden: Vec<Vec<f32>> = (1..=tokens.len()).map(|n| fake::expected_hidden(&shape, &tokens[..n])).collect();
        for threads in [1, 3] {
            let model = open(&shape, threads);
            let last = model.embed(&tokens, Pooling::Last).unwrap();
            assert_eq!(&last, hidden.last().unwrap());
            let mean = model.embed(&tokens, Pooling::Mean).unwrap();
            for (i, value) in mean.iter().enumerate() {
                let sum = hidden.iter().fold(0.0, |sum, row| sum + row[i]);
                assert_eq!(*value, sum * (1.0 / 100.0f32));
            }
            assert_eq!(model.pages().pages_in_use(), 0);
            assert!(matches!(model.embed(&[], Pooling::Mean), Err(Error::NoTokens)));
            assert!(matches!(model.embed(&[384], Pooling::Mean), Err(Error::Token { id: 384, .. })));
            assert!(matches!(model.embed(&[1; 1001], Pooling::Last), Err(Error::ContextFull { tokens: 1001, .. })));
        }
    }
}
