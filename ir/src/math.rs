//! Elementary functions, written out of IEEE operations and FMA, so that every lowering gives the same bits.
