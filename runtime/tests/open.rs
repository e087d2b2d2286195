//! Opening a model: every way in which descriptor, CPU, payload and memory can be wrong, before any code runs.

mod fake;

use fake::Shape;
use moec_abi::{ABI_VERSION, ModelDescriptor, PayloadHeader, Plain, Trailer, features};
use moec_runtime::{Descriptor, Error, Model, Options, Payload, PayloadSource, PoolOptions};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

fn checked(descriptor: &'static ModelDescriptor) -> moec_runtime::Result<Descriptor> {
    // SAFETY: the fake model's descriptor is as a generated one, or differs in plain fields.
    unsafe { Descriptor::new(descriptor) }
}

fn changed(change: impl FnOnce(&mut ModelDescriptor)) -> moec_runtime::Result<Descriptor> {
    // SAFETY: a descriptor is plain data.
    let mut copy = unsafe { std::ptr::read(fake::descriptor(&Shape::default())) };
    change(&mut copy);
    checked(Box::leak(Box::new(copy)))
}

#[test]
fn descriptors_are_checked_field_by_field() {
    changed(|_| ()).unwrap();
    // SAFETY: null is allowed.
    assert!(matches!(unsafe { Descriptor::new(std::ptr::null()) }, Err(Error::Descriptor { .. })));
    assert!(matches!(changed(|d| d.magic += 1), Err(Error::Descriptor { .. })));
    assert!(
        matches!(changed(|d| d.abi_version += 1), Err(Error::AbiVersion { expected: ABI_VERSION, found }) if found == ABI_VERSION + 1)
    );
    assert!(matches!(changed(|d| d.descriptor_bytes -= 8), Err(Error::Descriptor { .. })));
    type Change = fn(&mut ModelDescriptor);
    let broken: [(&str, Change); 9] = [
        ("levels", |d| d.level_count = 0),
        ("vocab", |d| d.logits_stride = 16),
        ("logits_stride", |d| d.logits_stride += 1),
        ("context", |d| d.context = 0),
        ("max_tokens", |d| d.max_tokens = 0),
        ("kv_type", |d| d.kv_type = 9),
        ("page_tokens", |d| d.page_tokens = 32),
        ("experts_per_token", |d| d.experts_per_token = 6),
        ("routes_offset", |d| d.routes_offset = u64::MAX - 3),
    ];
    for (field, change) in broken {
        let error = changed(change).err().expect(field).to_string();
        assert!(error.contains(&format!("`{field}`")), "{error}");
    }
}

#[test]
fn a_level_is_chosen_by_what_the_cpu_has() {
    let shape = Shape { features: features::AVX2 | features::FMA, ..Shape::default() };
    let descriptor = checked(fake::descriptor(&shape)).unwrap();
    let level = descriptor.choose_level(None, features::AVX2 | features::FMA | features::F16C).unwrap();
    assert_eq!(level.name(), "plain");
    assert_eq!(descriptor.choose_level(None, u64::MAX).unwrap().name(), "impossible");
    assert_eq!(descriptor.choose_level(Some("plain"), u64::MAX).unwrap().name(), "plain");
    let error = descriptor.choose_level(None, features::AVX2).unwrap_err();
    let remedy = match cfg!(target_arch = "x86_64") {
        true => "moec needs AVX2 and FMA, so use a CPU of 2013 or later that has them",
        false => "build it again with `--target-cpu native`",
    };
    assert_eq!(
        error.to_string(),
        format!(
            "this CPU lacks fma, which the model's code for plain needs: {remedy} (this model was compiled for impossible, plain)"
        )
    );
    let v3 = features::X86_64_V2 | features::AVX2 | features::FMA | features::F16C;
    let error = descriptor.choose_level(Some("impossible"), v3).unwrap_err().to_string();
    assert!(error.contains("build it again with `--target-cpu x86-64-v3`"), "{error}");
    let error = descriptor.choose_level(Some("zen9"), u64::MAX).unwrap_err();
    assert_eq!(error.to_string(), "the model has no code for zen9; it was compiled for impossible, plain");
}

fn options(payload: PayloadSource) -> Options {
    Options { payload, pool: PoolOptions { threads: Some(1), pin_caller: false }, ..Options::default() }
}

#[test]
fn memory_is_checked_before_it_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { extra_scratch: 1 << 46, ..Shape::default() };
    let payload = PayloadSource::File(fake::write_payload(&shape, dir.path()));
    let descriptor = checked(fake::descriptor(&shape)).unwrap();
    let error = Model::open(descriptor, &options(payload)).err().unwrap().to_string();
    assert!(error.starts_with("not enough memory: working memory for 1 threads needs 70.4 TB, but only "), "{error}");
    assert!(error.ends_with("free memory, or use fewer `--threads`"), "{error}");
}

/// A payload file, changed.
fn open_file(change: impl FnOnce(&mut Vec<u8>)) -> moec_runtime::Result<Payload> {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape::default();
    let path = dir.path().join("w");
    let mut bytes = fake::payload(&shape);
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    Payload::open(&PayloadSource::File(path), checked(fake::descriptor(&shape)).unwrap().payload())
}

fn header(bytes: &mut [u8], change: impl FnOnce(&mut PayloadHeader)) {
    let mut header = PayloadHeader::from_bytes(bytes).unwrap();
    change(&mut header);
    bytes[..size_of::<PayloadHeader>()].copy_from_slice(header.as_bytes());
}

#[test]
fn payload_files_are_checked() {
    let payload = open_file(|_| ()).unwrap();
    assert_eq!(payload.metadata().unwrap().name, "fake");
    assert_eq!(payload.bytes().as_ptr() as usize % 4096, 0);
    assert!(payload.tokenizer().unwrap().starts_with(b"{"));
    assert!(payload.golden().unwrap().is_none());
    assert!(payload.resident(0..4096) >= 0.0);

    assert!(matches!(open_file(|b| b.truncate(10)), Err(Error::PayloadDamaged { .. })));
    assert!(matches!(open_file(|b| b.clear()), Err(Error::PayloadDamaged { .. })));
    assert!(matches!(open_file(|b| b.truncate(b.len() - 1)), Err(Error::PayloadDamaged { .. })));
    assert!(matches!(open_file(|b| b.push(0)), Err(Error::PayloadDamaged { .. })));
    assert!(matches!(open_file(|b| b[0] ^= 1), Err(Error::PayloadDamaged { .. })));
    assert!(matches!(open_file(|b| header(b, |h| h.abi_version = 7)), Err(Error::AbiVersion { found: 7, .. })));
    assert!(matches!(open_file(|b| header(b, |h| h.key[31] ^= 1)), Err(Error::PayloadForeign { .. })));
    assert!(matches!(open_file(|b| header(b, |h| h.payload_bytes += 1)), Err(Error::PayloadDamaged { .. })));
    assert!(matches!(open_file(|b| header(b, |h| h.metadata_offset = u64::MAX)), Err(Error::PayloadDamaged { .. })));
    assert!(matches!(open_file(|b| header(b, |h| h.tokenizer_bytes = 1 << 40)), Err(Error::PayloadDamaged { .. })));
    let metadata = open_file(|b| header(b, |h| h.metadata_bytes -= 1)).unwrap().metadata();
    assert!(matches!(metadata, Err(Error::PayloadDamaged { .. })));
    let nowhere = PayloadSource::File("/nowhere/at/all".into());
    let expected = checked(fake::descriptor(&Shape::default())).unwrap().payload();
    let error = Payload::open(&nowhere, expected).err().unwrap();
    assert!(error.to_string().starts_with("cannot read the weights from /nowhere/at/all: "), "{error}");
}

#[test]
fn reading_ahead_brings_all_in() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let shape = Shape { tokenizer: vec![b'x'; 40 << 20], ..Shape::default() };
    let path = fake::write_payload(&shape, dir.path());
    let file = fs::File::open(&path).unwrap();
    file.sync_all().unwrap();
    let payload =
        Payload::open(&PayloadSource::File(path), checked(fake::descriptor(&shape)).unwrap().payload()).unwrap();
    let all = 0..payload.bytes().len();
    // SAFETY: advice about a file that is open.
    unsafe { libc::posix_fadvise(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 0, libc::POSIX_FADV_DONTNEED) };
    payload.read_ahead(&AtomicBool::new(true));
    payload.read_ahead(&AtomicBool::new(false));
    let started = Instant::now();
    while payload.resident(all.clone()) < 1.0 {
        assert!(started.elapsed() < Duration::from_secs(20), "{}", payload.resident(all.clone()));
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct Executable {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn executable(shape: &Shape) -> Executable {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    fs::write(&program, vec![0x7f; 12_345]).unwrap();
    let path = dir.path().join("model");
    let golden = moec_abi::metadata::Golden { tokens: vec![1, 2], logits_fnv1a: 42, first_logits: vec![0.5] };
    fake::append(shape, &program, &path, Some(&golden));
    Executable { _dir: dir, path }
}

fn open_executable(path: &Path) -> moec_runtime::Result<Payload> {
    let expected = checked(fake::descriptor(&Shape::default())).unwrap().payload();
    Payload::open(&PayloadSource::ExecutableAt(path.to_owned()), expected)
}

#[test]
fn executables_carry_their_payload() {
    let executable = executable(&Shape::default());
    let payload = open_executable(&executable.path).unwrap();
    assert_eq!(payload.bytes(), fake::payload(&Shape::default()));
    assert_eq!(payload.golden().unwrap().unwrap().logits_fnv1a, 42);
}

#[test]
fn executables_without_their_payload_say_so() {
    let message = |change: &dyn Fn(&mut Vec<u8>)| {
        let executable = executable(&Shape::default());
        let mut bytes = fs::read(&executable.path).unwrap();
        change(&mut bytes);
        fs::write(&executable.path, bytes).unwrap();
        open_executable(&executable.path).err().expect("broken").to_string()
    };
    let size = size_of::<Trailer>();
    let trailer = |bytes: &mut Vec<u8>, change: &dyn Fn(&mut Trailer)| {
        let at = bytes.len() - size;
        let mut trailer = Trailer::from_bytes(&bytes[at..]).unwrap();
        change(&mut trailer);
        bytes[at..].copy_from_slice(trailer.as_bytes());
    };
    // Stripped, truncated anywhere, with something appended.
    assert!(message(&|b| b.truncate(12_345)).contains("nothing at its end says where they are"));
    assert!(message(&|b| b.truncate(100)).contains("the file has 100 bytes, the weights alone have"));
    assert!(message(&|b| b.clear()).contains("the file has 0 bytes"));
    assert!(message(&|b| b.truncate(b.len() - 1)).contains("has lost its weights"));
    assert!(message(&|b| b.extend([0; 77])).contains("77 bytes follow"));
    assert!(message(&|b| drop(b.drain(..4096))).contains("it was written with"));
    for text in [message(&|b| b.truncate(12_345)), message(&|b| b.extend([0; 77]))] {
        assert!(text.contains("copy the original again or rebuild it, and do not strip it"), "{text}");
    }
    // Foreign and damaged.
    assert!(message(&|b| trailer(b, &|t| t.key[0] ^= 1)).contains("belong to another model"));
    assert!(message(&|b| trailer(b, &|t| t.payload_bytes -= 4096)).contains("the code expects"));
    assert!(message(&|b| trailer(b, &|t| t.payload_offset = u64::MAX - 4095)).contains("points outside"));
    assert!(message(&|b| trailer(b, &|t| t.payload_offset += 1)).contains("are damaged"));
    assert!(message(&|b| trailer(b, &|t| t.golden_bytes = u64::MAX)).contains("points outside"));
    assert!(message(&|b| b[16_384] ^= 1).contains("do not begin as weights of moec do"));
    let other = executable(&Shape { vocab: 200, ..Shape::default() });
    assert!(matches!(open_executable(&other.path), Err(Error::PayloadForeign { .. })));
}

#[test]
fn a_program_without_payload_is_no_model() {
    let expected = checked(fake::descriptor(&Shape::default())).unwrap().payload();
    let error = Payload::open(&PayloadSource::Executable, expected).err().unwrap();
    let name = std::env::current_exe().unwrap();
    assert!(error.to_string().starts_with(&format!("{} has lost its weights", name.display())), "{error}");
}

#[test]
fn weights_may_be_in_memory_or_in_an_open_file() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape::default();
    let expected = checked(fake::descriptor(&shape)).unwrap().payload();
    let bytes = fake::payload(&shape);
    // Behind something else in a file.
    let path = dir.path().join("container");
    fs::write(&path, [&[7; 8192][..], &bytes, &[9; 100]].concat()).unwrap();
    let open =
        |offset| Payload::open(&PayloadSource::Opened(Arc::new(fs::File::open(&path).unwrap()), offset), expected);
    let mapped = open(8192).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(mapped.bytes(), bytes);
    fs::write(&path, [&[7; 8192][..], &bytes].concat()).unwrap();
    for offset in [0, 1, 4096, 12_288, u64::MAX - 4095] {
        let error = open(offset).err().unwrap().to_string();
        assert!(error.starts_with("the weights in the open file are damaged ("), "{error}");
    }
    // Aligned memory, leaked as a program's own would be.
    let memory: &'static memmap2::Mmap = Box::leak(Box::new({
        let mut map = memmap2::MmapMut::map_anon(bytes.len() + 4096).unwrap();
        map[..bytes.len()].copy_from_slice(&bytes);
        map.make_read_only().unwrap()
    }));
    let open = |bytes| Payload::open(&PayloadSource::Memory(bytes), expected);
    let given = open(&memory[..bytes.len()]).unwrap();
    assert_eq!((given.bytes(), given.metadata().unwrap().name.as_str()), (&bytes[..], "fake"));
    given.read_ahead(&AtomicBool::new(false));
    let refused = |bytes| open(bytes).err().unwrap().to_string();
    assert!(refused(&memory[..bytes.len() - 1]).contains("were expected"));
    assert!(refused(&memory[64..bytes.len() + 64]).contains("not aligned to 4096 bytes"));
    assert!(refused(&memory[4096..bytes.len() + 4096]).contains("do not begin as weights of moec do"));
}
