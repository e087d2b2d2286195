//! What the tests of moec share.

pub mod filetest;
pub mod native;
