//! From the graph to what the machine does: layouts, stages, buffers and the payload's map.

pub mod layout;
pub mod quant;
