//! How matrices and activation rows lie in memory: the arithmetic that packing, kernels and the plan share.
//!
//! A matrix `[rows, K]` is cut into *tiles* of 16 rows; one logical vector is one column of a tile, and K is walked in order.
//! Tiles lie one after another. Float formats hold `[K][16]` elements a tile, but bf16 `[K / 2][16][2]`: one operation
//! makes f32 of either half of a word. Quantized ones hold groups of 128 of K: first the scales of the group's blocks ([`Scales`] says how; padded to 64
//! bytes, so that every vector load is aligned), then the blocks' codes: of 8 bits as `[8][16][4]` bytes, of 4 bits as `[4][16][4]` bytes whose low
//! nibbles are the first 16 of K and whose high ones the second.
//!
//! `q8` and `q4` are moec's own, for weights that it quantizes. The others keep the codes and scales of a stored format as they are; they differ
//! from those in the order of bytes only, but that codes of 5 and 6 bits take 8, those of 2 and 3 take 4, and scales of 4 and 6 take 8.
//!
//! Deliberately absent: where a weight lies in the payload ([`super::payload`](crate::plan)) and how codes are chosen (`quant`).

use moec_abi::{LANES, round_up};
use moec_ir::graph::{Layout, RowContent, RowSums};

/// Elements of K that share one weight scale.
pub const BLOCK: usize = 32;

/// Elements of K whose weight scales lie together.
pub const GROUP: usize = 128;

/// Alignment of tiles and of quantized activation rows, in bytes.
pub const TILE_ALIGN: usize = 64;

/// How the elements of a matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Format {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// 8-bit codes, a scale for 32: 8.5 bits an element.
    Q8,
    /// 4-bit codes into a code book, a scale for 32: 4.5 bits an element.
    Q4,
    /// 8-bit integers, an f16 scale for 32: 8.5 bits an element.
    Q8_0,
    /// 8-bit integers from 0 on, an f16 scale and an f16 offset for 32: 9 bits an element.
    Q5_1,
    /// 8-bit integers from 0 on, scale and offset for 32 in steps of factors for 128: 8.75 bits an element.
    Q5K,
    /// 4-bit integers from −8 on, an f16 scale for 32: 4.5 bits an element.
    Q4_0,
    /// 4-bit integers from 0 on, an f16 scale and an f16 offset for 32: 5 bits an element.
    Q4_1,
    /// 4-bit integers from 0 on, scale and offset for 32 in steps of factors for 128: 4.75 bits an element.
    Q4K,
    /// 4-bit codes into the code book of GGUF's IQ4_NL, an f16 scale for 32: 4.5 bits an element.
    Iq4Nl,
    /// 4-bit floats of one mantissa bit, a bf16 scale for 32: 4.5 bits an element.
    Mxfp4,
    /// 8-bit integers, a scale for 16 in steps of a factor for 128: 8.75 bits an element.
    Q6K,
    /// 4-bit integers from −4 on, a scale for 16 in steps of a factor for 128: 4.75 bits an element.
    Q3K,
    /// 4-bit integers from 0 on, scale and offset for 16 in steps of factors for 128: 5.25 bits an element.
    Q2K,
    /// 4-bit codes into the code book of GGUF's IQ4_NL, a scale for 32 in steps of a factor for 128: 4.5 bits an element.
    Iq4Xs,
}

/// How the scales of a group lie before its codes, for each block of 32 of K.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scales {
    /// `[blocks][16]` bf16.
    Bf16,
    /// `[blocks][16]` f16.
    F16,
    /// `[blocks]`: `[16]` scales, `[16]` offsets, f16.
    Pairs,
    /// `[16]` factors of scales and, with offsets, `[16]` factors of offsets, f16; then for each part of a block `[16]` and, with offsets, `[16]`
    /// signed bytes, the steps. A scale is its step times its factor, and so is an offset.
    Steps {
        /// Whether there are offsets.
        offsets: bool,
        /// Parts of a block that have a scale each: 1, or 2 of 16 of K.
        parts: usize,
    },
}

impl Scales {
    /// Bytes of the factors of [`Scales::Steps`], after which its steps begin.
    pub const fn factor_bytes(offsets: bool) -> usize {
        2 * LANES * if offsets { 2 } else { 1 }
    }
}

/// What the codes of a block stand for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codes {
    /// A byte is the value plus 128.
    Bytes,
    /// A byte is the value, below 128: the format has offsets.
    PlainBytes,
    /// A nibble is the place of the value plus 128 in this code book.
    Book([u8; 16]),
    /// A nibble is the value: the format has offsets.
    Nibbles,
}

/// What is added to the values of a format to make them bytes that are small and not negative: of such bytes and signed ones, the sums of two products
/// twice over have room in 16 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Small {
    /// What is added: 0, or a power of two up to 32.
    pub bias: u8,
    /// The largest sum, at most 63.
    pub largest: u8,
}

/// The 16 values that `q4` codes stand for, each plus 128, rising: [`quant`](super::quant) says where they are from.
pub const CODEBOOK: [u8; 16] = [97, 104, 109, 113, 117, 120, 123, 126, 128, 131, 134, 137, 141, 145, 150, 159];

/// −8 to 7, plus 128.
const FROM_MINUS_8: [u8; 16] = [120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135];

/// −4 to 11, plus 128; codes of three bits reach 3.
const FROM_MINUS_4: [u8; 16] = [124, 125, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139];

/// The values of IQ4_NL, plus 128.
const IQ4: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// Twice the values of floats of one sign, two exponent bits and one mantissa bit, plus 128.
const DOUBLED_E2M1: [u8; 16] = [128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116];

impl Format {
    /// All of them.
    pub const ALL: [Format; 17] = [
        Format::F32,
        Format::Bf16,
        Format::F16,
        Format::Q8,
        Format::Q4,
        Format::Q8_0,
        Format::Q5_1,
        Format::Q5K,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q4K,
        Format::Iq4Nl,
        Format::Mxfp4,
        Format::Q6K,
        Format::Q3K,
        Format::Q2K,
        Format::Iq4Xs,
    ];

    /// The format of a layout; `None` for one that is not resolved.
    pub const fn of(layout: Layout) -> Option<Format> {
        Some(match layout {
            Layout::Stored => return None,
            Layout::F32 => Format::F32,
            Layout::Bf16 => Format::Bf16,
            Layout::F16 => Format::F16,
            Layout::Q8 => Format::Q8,
            Layout::Q4 => Format::Q4,
            Layout::Q8_0 => Format::Q8_0,
            Layout::Q5_1 => Format::Q5_1,
            Layout::Q5K => Format::Q5K,
            Layout::Q4_0 => Format::Q4_0,
            Layout::Q4_1 => Format::Q4_1,
            Layout::Q4K => Format::Q4K,
            Layout::Iq4Nl => Format::Iq4Nl,
            Layout::Mxfp4 => Format::Mxfp4,
            Layout::Q6K => Format::Q6K,
            Layout::Q3K => Format::Q3K,
            Layout::Q2K => Format::Q2K,
            Layout::Iq4Xs => Format::Iq4Xs,
        })
    }

    /// The layout whose format it is.
    pub const fn layout(self) -> Layout {
        match self {
            Format::F32 => Layout::F32,
            Format::Bf16 => Layout::Bf16,
            Format::F16 => Layout::F16,
            Format::Q8 => Layout::Q8,
            Format::Q4 => Layout::Q4,
            Format::Q8_0 => Layout::Q8_0,
            Format::Q5_1 => Layout::Q5_1,
            Format::Q5K => Layout::Q5K,
            Format::Q4_0 => Layout::Q4_0,
            Format::Q4_1 => Layout::Q4_1,
            Format::Q4K => Layout::Q4K,
            Format::Iq4Nl => Layout::Iq4Nl,
            Format::Mxfp4 => Layout::Mxfp4,
            Format::Q6K => Layout::Q6K,
            Format::Q3K => Layout::Q3K,
            Format::Q2K => Layout::Q2K,
            Format::Iq4Xs => Layout::Iq4Xs,
        }
    }

    /// The name used in dumps and, where it can be asked for, on the command line.
    pub const fn name(self) -> &'static str {
        self.layout().name()
    }

    /// What its codes stand for; `None` for the float formats.
    pub const fn codes(self) -> Option<Codes> {
        Some(match self {
            Format::F32 | Format::Bf16 | Format::F16 => return None,
            Format::Q8 | Format::Q8_0 | Format::Q6K => Codes::Bytes,
            Format::Q5_1 | Format::Q5K => Codes::PlainBytes,
            Format::Q4 => Codes::Book(CODEBOOK),
            Format::Q4_0 => Codes::Book(FROM_MINUS_8),
            Format::Q3K => Codes::Book(FROM_MINUS_4),
            Format::Iq4Nl | Format::Iq4Xs => Codes::Book(IQ4),
            Format::Mxfp4 => Codes::Book(DOUBLED_E2M1),
            Format::Q4_1 | Format::Q4K | Format::Q2K => Codes::Nibbles,
        })
    }

    /// What makes its values small bytes; `None` where they are too far apart, and for the float formats.
    pub fn small(self) -> Option<Small> {
        let (least, most) = match (self, self.codes()?) {
            (_, Codes::Nibbles) => (0, 15),
            (Format::Q5_1 | Format::Q5K, _) => (0, 31),
            (Format::Q6K, _) => (-32, 31),
            (_, Codes::Bytes | Codes::PlainBytes) => return None,
            (_, Codes::Book(book)) => {
                let values = book.map(|value| i16::from(value) - 128);
                (values.into_iter().min()?, values.into_iter().max()?)
            }
        };
        let bias = if least < 0 { least.unsigned_abs().next_power_of_two() } else { 0 };
        let (bias, largest) = (u8::try_from(bias).ok()?, u8::try_from(most + bias as i16).ok()?);
        (bias <= 32 && largest < 64).then_some(Small { bias, largest })
    }

    /// How its scales lie; `None` for the float formats.
    pub const fn scales(self) -> Option<Scales> {
        Some(match self {
            Format::F32 | Format::Bf16 | Format::F16 => return None,
            Format::Q8 | Format::Q4 | Format::Mxfp4 => Scales::Bf16,
            Format::Q8_0 | Format::Q4_0 | Format::Iq4Nl => Scales::F16,
            Format::Q5_1 | Format::Q4_1 => Scales::Pairs,
            Format::Q5K | Format::Q4K => Scales::Steps { offsets: true, parts: 1 },
            Format::Q6K | Format::Q3K => Scales::Steps { offsets: false, parts: 2 },
            Format::Q2K => Scales::Steps { offsets: true, parts: 2 },
            Format::Iq4Xs => Scales::Steps { offsets: false, parts: 1 },
        })
    }

    /// Whether activations are quantized to meet it.
    pub const fn is_quantized(self) -> bool {
        self.layout().is_quantized()
    }

    /// Whether it keeps the codes and scales of a stored format.
    pub const fn is_exact(self) -> bool {
        self.layout().is_exact()
    }

    /// Whether a weight is `scale × code + offset`, with codes from 0 on, and not `scale × value`.
    pub const fn has_offsets(self) -> bool {
        self.layout().has_offsets()
    }

    /// Elements of K that share a scale.
    pub const fn scale_columns(self) -> usize {
        self.layout().scale_columns()
    }

    /// Scales, and offsets where there are any, that the columns of one block have.
    pub const fn parts(self) -> usize {
        BLOCK / self.scale_columns()
    }

    /// What an activation row holds when it meets this format alone.
    pub const fn row(self) -> RowContent {
        self.layout().row()
    }

    /// The sums of an activation row's codes that a product with it needs, if it is quantized.
    pub const fn row_sums(self) -> RowSums {
        self.layout().row_sums()
    }

    /// Bytes of one element of a float format; `None` for the quantized ones.
    pub const fn element_bytes(self) -> Option<usize> {
        match self {
            Format::F32 => Some(4),
            Format::Bf16 | Format::F16 => Some(2),
            _ => None,
        }
    }

    /// Whether the columns of a tile lie in pairs, `[K / 2][16][2]`, so that a word has two columns of a row; the last of an odd number has a 0 beside it.
    pub const fn in_pairs(self) -> bool {
        matches!(self, Format::Bf16)
    }

    /// Bytes of the codes of one block of 32 of K in one tile.
    pub const fn block_bytes(self) -> usize {
        match self.codes() {
            None => 0,
            Some(Codes::Bytes | Codes::PlainBytes) => BLOCK * LANES,
            Some(Codes::Book(_) | Codes::Nibbles) => BLOCK * LANES / 2,
        }
    }

    /// Bytes that the scales of a group of `blocks` blocks take in a tile.
    pub const fn scale_bytes(self, blocks: usize) -> usize {
        match self.scales() {
            None => 0,
            Some(Scales::Bf16 | Scales::F16) => round_up(blocks * LANES * 2, TILE_ALIGN),
            Some(Scales::Pairs) => blocks * LANES * 4,
            Some(Scales::Steps { offsets, parts }) => {
                let steps = parts * if offsets { 2 } else { 1 };
                round_up(Scales::factor_bytes(offsets) + blocks * steps * LANES, TILE_ALIGN)
            }
        }
    }

    /// Bytes of one group of `blocks` (1 ..= 4) blocks in one tile, its scales included.
    pub const fn group_bytes(self, blocks: usize) -> usize {
        self.scale_bytes(blocks) + blocks * self.block_bytes()
    }

    /// Bytes of a tile before column `k`, a multiple of [`GROUP`].
    pub const fn bytes_before(self, k: usize) -> usize {
        assert!(k.is_multiple_of(GROUP), "columns are divided between groups");
        match self.element_bytes() {
            Some(bytes) => k * LANES * bytes,
            None => k / GROUP * self.group_bytes(GROUP / BLOCK),
        }
    }

    /// Bytes from one tile of a matrix with `k` columns to the next.
    pub const fn tile_bytes(self, k: usize) -> usize {
        match self.element_bytes() {
            Some(bytes) => round_up(k * LANES * bytes, TILE_ALIGN),
            None => {
                let blocks = k.div_ceil(BLOCK);
                let (full, rest) = (blocks / 4, blocks % 4);
                let tail = if rest == 0 { 0 } else { self.group_bytes(rest) };
                full * self.group_bytes(4) + tail
            }
        }
    }

    /// Bytes of a matrix of `rows` (padded to 16) by `k`.
    pub const fn matrix_bytes(self, rows: usize, k: usize) -> usize {
        rows.div_ceil(LANES) * self.tile_bytes(k)
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A quantized activation row of `k` elements: signed bytes, then an f32 scale for each span, then the sums that it has ([`RowSums`] says of what), one
/// kind after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QuantizedRow {
    /// Elements, padded with zeros to a multiple of [`BLOCK`].
    pub k: usize,
    /// What it holds.
    pub content: RowContent,
}

impl QuantizedRow {
    /// A row of `k` elements. The content's span is [`BLOCK`] times a power of two, at most [`GROUP`].
    pub const fn new(k: usize, content: RowContent) -> QuantizedRow {
        QuantizedRow { k: round_up(k, BLOCK), content }
    }

    /// Offset of the scales in bytes.
    pub const fn scales(self) -> usize {
        self.k
    }

    /// Offset of these sums in bytes, or where they would be.
    pub fn sums(self, sums: RowSums) -> usize {
        let scales = 4 * self.k.div_ceil(self.content.span);
        let before = self.content.sums().take_while(|&other| other < sums);
        self.scales() + scales + before.map(|other| self.sum_bytes(other)).sum::<usize>()
    }

    const fn sum_bytes(self, sums: RowSums) -> usize {
        4 * (self.k / sums.columns())
    }

    /// Bytes from one row to the next.
    pub fn stride(self) -> usize {
        let last = RowSums::Scaled16;
        let end = self.sums(last) + if self.content.has(last) { self.sum_bytes(last) } else { 0 };
        round_up(end, TILE_ALIGN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_from_bits() {
        assert_eq!(Format::Q4.tile_bytes(4096), 4096 * 16 * 9 / 16);
        assert_eq!(Format::Q8.tile_bytes(4096), 4096 * 16 * 17 / 16);
        assert_eq!(Format::Bf16.tile_bytes(4096), 4096 * 32);
        for (format, eighths) in [
            (Format::Q8_0, 68),
            (Format::Q5_1, 72),
            (Format::Q5K, 70),
            (Format::Q4_0, 36),
            (Format::Q4_1, 40),
            (Format::Q4K, 38),
            (Format::Iq4Nl, 36),
            (Format::Mxfp4, 36),
            (Format::Q6K, 70),
            (Format::Q3K, 38),
            (Format::Q2K, 42),
            (Format::Iq4Xs, 36),
        ] {
            assert_eq!(format.tile_bytes(4096), 4096 * 16 * eighths / 64, "{format}");
        }
    }

    #[test]
    fn formats_and_layouts_have_the_same_names() {
        let layouts = Layout::ALL.into_iter().filter(|&layout| layout != Layout::Stored);
        assert!(layouts.eq(Format::ALL.map(Format::layout)));
        assert!(Format::ALL.into_iter().all(|format| Format::of(format.layout()) == Some(format)));
        for format in Format::ALL {
            let parts = if let Some(Scales::Steps { parts, .. }) = format.scales() { parts } else { 1 };
            assert_eq!(format.parts(), parts, "{format}");
        }
    }

    #[test]
    fn sums_lie_one_kind_after_the_other() {
        let content = Format::Q2K.row().and(Format::Q6K.row()).and(Format::Q8.row());
        assert_eq!(content.to_string(), "s32_corrections32_corrections16_scaled16");
        assert_eq!(
            (Format::Q8.row().to_string(), Format::Q4K.row().to_string()),
            ("s64".into(), "s32_scaled32".into())
        );
        let row = QuantizedRow::new(64, content);
        let [corrections, halves, scaled] =
            [RowSums::Corrections32, RowSums::Corrections16, RowSums::Scaled16].map(|sums| row.sums(sums));
        assert_eq!((row.scales(), corrections, halves, scaled), (64, 72, 80, 96));
        assert_eq!(row.stride(), 128);
    }

    #[test]
    fn values_are_small_where_they_can_be() {
        let small = |format: Format| format.small().map(|Small { bias, largest }| (bias, largest));
        for (format, expected) in [
            (Format::Bf16, None),
            (Format::Q8, None),
            (Format::Q8_0, None),
            (Format::Iq4Nl, None),
            (Format::Q4, Some((32, 63))),
            (Format::Q6K, Some((32, 63))),
            (Format::Q5K, Some((0, 31))),
            (Format::Mxfp4, Some((16, 28))),
            (Format::Q4_0, Some((8, 15))),
            (Format::Q3K, Some((4, 15))),
            (Format::Q4K, Some((0, 15))),
        ] {
            assert_eq!(small(format), expected, "{format}");
        }
    }

    #[test]
    fn odd_sizes_stay_aligned() {
        for k in [1, 20, 31, 32, 33, 96, 100, 129, 160, 4095] {
            for format in Format::ALL {
                assert_eq!(format.tile_bytes(k) % TILE_ALIGN, 0, "{format} {k}");
            }
            for span in [32, 64, 128] {
                let row = QuantizedRow::new(k, RowContent::new(span, RowSums::Corrections32));
                assert_eq!(row.sums(RowSums::Corrections32), row.k + 4 * row.k.div_ceil(span));
                assert_eq!(row.stride(), round_up(row.sums(RowSums::Corrections32) + 4 * row.k / BLOCK, TILE_ALIGN));
            }
        }
    }
}
