//! The evaluator's memory, and what can go wrong in it and elsewhere.

/// Why a function could not be run to its end.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{function}: `{line}`: {fault}")]
pub struct Error {
    /// The function's name.
    pub function: String,
    /// The guilty instruction in text form.
    pub line: String,
    /// What went wrong.
    pub fault: Fault,
}

/// What can go wrong in an instruction.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// Memory outside all regions is touched.
    #[error("{bytes} bytes at {address:#x} are outside memory{}", near(.region))]
    OutOfBounds {
        /// The first byte touched.
        address: i64,
        /// How many.
        bytes: usize,
        /// The region whose slot the address is in: its address and size.
        region: Option<(i64, usize)>,
    },
    /// A byte that is looked up in a table of 16 is too large.
    #[error("byte {0} is looked up in a table of 16")]
    LookupIndex(u8),
    /// The second factor of a dot product of signed bytes has the least of them.
    #[error("the second factor of a dot product of signed bytes has a byte -128")]
    LeastByte,
    /// The number of arguments is wrong.
    #[error("called with {0} arguments")]
    Arguments(usize),
}

fn near(region: &Option<(i64, usize)>) -> String {
    match region {
        Some((start, bytes)) => format!(" (the region at {start:#x} has {bytes} bytes)"),
        None => String::new(),
    }
}

/// Memory of the evaluator: regions, each the only one in its 4 GiB of addresses.
#[derive(Clone, Default, Debug)]
pub struct Memory {
    regions: Vec<Vec<u8>>,
}

/// Bits of an address that count bytes in a region; the rest, minus one, is the region's number.
const SLOT_BITS: u32 = 32;

impl Memory {
    /// No regions.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Adds a region with this content; returns its address.
    pub fn add(&mut self, bytes: impl Into<Vec<u8>>) -> i64 {
        let bytes = bytes.into();
        // An i32 offset from any address in a region then stays clear of the neighbours.
        assert!(bytes.len() < 1 << 30, "a region of the evaluator's memory is below 1 GiB");
        self.regions.push(bytes);
        (self.regions.len() as i64) << SLOT_BITS
    }

    /// Adds a region of zeros; returns its address.
    pub fn add_zeros(&mut self, bytes: usize) -> i64 {
        self.add(vec![0; bytes])
    }

    /// Adds a region with these f32 numbers; returns its address.
    pub fn add_f32(&mut self, x: &[f32]) -> i64 {
        self.add(x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// The region that starts at `address`, as returned by [`Memory::add`].
    ///
    /// # Panics
    /// When there is none.
    pub fn bytes(&self, address: i64) -> &[u8] {
        &self.regions[Memory::number(address)]
    }

    /// As [`Memory::bytes`], to be written.
    pub fn bytes_mut(&mut self, address: i64) -> &mut [u8] {
        &mut self.regions[Memory::number(address)]
    }

    /// The region that starts at `address` as f32 numbers.
    pub fn f32s(&self, address: i64) -> Vec<f32> {
        self.bytes(address).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn number(address: i64) -> usize {
        assert!(address > 0 && address.trailing_zeros() >= SLOT_BITS, "{address:#x} is not the start of a region");
        (address >> SLOT_BITS) as usize - 1
    }

    fn locate(&self, address: i64, bytes: usize) -> Result<(usize, usize), Fault> {
        let number = ((address as u64) >> SLOT_BITS).wrapping_sub(1) as usize;
        let start = address as u32 as usize;
        match self.regions.get(number) {
            Some(r) if start + bytes <= r.len() => Ok((number, start)),
            other => {
                let region = other.map(|r| ((number as i64 + 1) << SLOT_BITS, r.len()));
                Err(Fault::OutOfBounds { address, bytes, region })
            }
        }
    }

    /// The `bytes` bytes at any address within a region.
    ///
    /// # Errors
    /// When they are not all in one region.
    pub fn read(&self, address: i64, bytes: usize) -> Result<&[u8], Fault> {
        let (number, start) = self.locate(address, bytes)?;
        Ok(&self.regions[number][start..start + bytes])
    }

    pub(super) fn write(&mut self, address: i64, content: &[u8]) -> Result<(), Fault> {
        let (number, start) = self.locate(address, content.len())?;
        self.regions[number][start..start + content.len()].copy_from_slice(content);
        Ok(())
    }
}
