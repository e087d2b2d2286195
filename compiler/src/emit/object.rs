//! The object file: kernels, entry points for each CPU level, and the model's descriptor.
//!
//! The object is freestanding: it calls nothing by name. Each level is compiled by itself ([`super::level`]), with its own kernels under names of its own, so
//! that several levels live in one object over one payload. Deliberately absent: weights (they are the payload's) and linking.

use super::EmitError;
use super::level::{Entries, LevelTarget, define_level};
use crate::plan::{Plan, Programs, program};
use cranelift_codegen::ir::{Function, UserFuncName};
use cranelift_codegen::isa::OwnedTargetIsa;
use cranelift_frontend::FunctionBuilderContext;
use cranelift_module::{DataDescription, DataId, Linkage, Module};
use cranelift_object::{ObjectBuilder, ObjectModule};
use moec_abi::{ABI_VERSION, DESCRIPTOR_MAGIC, LANES, Level, ModelDescriptor, PAGE_TOKENS, Stage, round_up};
use std::collections::HashMap;
use std::mem::{offset_of, size_of};

/// Compiles `plan` for every level of `targets` (best first) into one object file. `prefix` starts the name of the exported descriptor, `<prefix>_model`.
///
/// # Errors
/// When a function cannot be compiled, which is a bug in moec: the error carries its name.
pub fn emit_object(plan: &Plan, targets: &[LevelTarget], prefix: &str, key: [u8; 32]) -> Result<Vec<u8>, EmitError> {
    let first = targets.first().expect("at least one CPU level");
    let libcalls = cranelift_module::default_libcall_names();
    let builder = ObjectBuilder::new(first.isa.clone(), prefix, libcalls).map_err(EmitError::module)?;
    let mut object = Object { module: ObjectModule::new(builder) };
    let mut levels = Vec::new();
    for (index, target) in targets.iter().enumerate() {
        levels.push(define_level(
            &mut object.module,
            plan,
            &plan.levels[index],
            target,
            &format!("{prefix}_l{index}"),
        )?);
    }
    object.descriptor(plan, targets, &levels, prefix, key)?;
    object.module.finish().emit().map_err(|e| EmitError::Object(e.to_string()))
}

/// Compiles an executable's `main`, which hands over to the application with the model's descriptor.
///
/// # Errors
/// As [`emit_object`].
pub fn emit_main(isa: &OwnedTargetIsa, prefix: &str) -> Result<Vec<u8>, EmitError> {
    use cranelift_codegen::ir::{AbiParam, InstBuilder, types};
    let libcalls = cranelift_module::default_libcall_names();
    let builder = ObjectBuilder::new(isa.clone(), "main", libcalls).map_err(EmitError::module)?;
    let mut module = ObjectModule::new(builder);
    let mut signature = module.make_signature();
    signature.params.extend([AbiParam::new(types::I32), AbiParam::new(types::I64)]);
    signature.returns.push(AbiParam::new(types::I32));
    let mut app = signature.clone();
    app.params.push(AbiParam::new(types::I64));
    let main = module.declare_function("main", Linkage::Export, &signature).map_err(EmitError::module)?;
    let app = module.declare_function("moec_app_main", Linkage::Import, &app).map_err(EmitError::module)?;
    let model =
        module.declare_data(&format!("{prefix}_model"), Linkage::Import, false, false).map_err(EmitError::module)?;
    let mut context = module.make_context();
    context.func = Function::with_name_signature(UserFuncName::user(0, main.as_u32()), signature);
    let mut builders = FunctionBuilderContext::new();
    let mut b = cranelift_frontend::FunctionBuilder::new(&mut context.func, &mut builders);
    let block = b.create_block();
    b.append_block_params_for_function_params(block);
    b.switch_to_block(block);
    b.seal_block(block);
    let app = module.declare_func_in_func(app, b.func);
    let model = module.declare_data_in_func(model, b.func);
    let (argc, argv) = (b.block_params(block)[0], b.block_params(block)[1]);
    let model = b.ins().symbol_value(types::I64, model);
    let call = b.ins().call(app, &[argc, argv, model]);
    let code = b.inst_results(call)[0];
    b.ins().return_(&[code]);
    b.finalize(isa.frontend_config());
    module.define_function(main, &mut context).map_err(EmitError::module)?;
    module.finish().emit().map_err(|e| EmitError::Object(e.to_string()))
}

struct Object {
    module: ObjectModule,
}

impl Object {
    fn text(&mut self, name: &str, text: &str) -> Result<DataId, EmitError> {
        let id = self.module.declare_data(name, Linkage::Local, false, false).map_err(EmitError::module)?;
        let mut data = DataDescription::new();
        data.define([text.as_bytes(), b"\0"].concat().into_boxed_slice());
        self.module.define_data(id, &data).map_err(EmitError::module)?;
        Ok(id)
    }

    /// The table of the stages of both programs.
    fn stages(&mut self, programs: &Programs, prefix: &str) -> Result<DataId, EmitError> {
        let all: Vec<&program::Stage> = programs.decode.stages.iter().chain(&programs.batch.stages).collect();
        let mut table = Record::new(size_of::<Stage>() * all.len());
        let mut data = DataDescription::new();
        let mut titles: HashMap<&str, DataId> = HashMap::new();
        let mut tables: HashMap<&[usize], DataId> = HashMap::new();
        for (i, stage) in all.into_iter().enumerate() {
            let at = i * size_of::<Stage>();
            let count = titles.len();
            let title = match titles.get(stage.title.as_str()) {
                Some(&title) => title,
                None => self.text(&format!("{prefix}_stage{count}_title"), &stage.title)?,
            };
            titles.insert(&stage.title, title);
            let title = self.module.declare_data_in_data(title, &mut data);
            data.write_data_addr(offset(at + offset_of!(Stage, title)), title, 0);
            table.put(at + offset_of!(Stage, weight_bytes), &(stage.weight_bytes as u64).to_le_bytes());
            table.put(at + offset_of!(Stage, common_bytes), &(stage.common_bytes as u64).to_le_bytes());
            table.put(at + offset_of!(Stage, multiply_adds), &(stage.multiply_adds as u64).to_le_bytes());
            let Some(experts) = &stage.experts else { continue };
            table.put(at + offset_of!(Stage, layer), &(experts.layer as u32).to_le_bytes());
            let count = tables.len();
            let bytes = match tables.get(&experts.bytes[..]) {
                Some(&bytes) => bytes,
                None => self.numbers(&format!("{prefix}_experts{count}"), &experts.bytes)?,
            };
            tables.insert(&experts.bytes, bytes);
            let bytes = self.module.declare_data_in_data(bytes, &mut data);
            data.write_data_addr(offset(at + offset_of!(Stage, expert_bytes)), bytes, 0);
        }
        self.constant(&format!("{prefix}_stages"), table, data)
    }

    /// A table of 64-bit numbers.
    fn numbers(&mut self, name: &str, numbers: &[usize]) -> Result<DataId, EmitError> {
        let mut table = Record::new(8 * numbers.len());
        for (i, &number) in numbers.iter().enumerate() {
            table.put(8 * i, &(number as u64).to_le_bytes());
        }
        self.constant(name, table, DataDescription::new())
    }

    /// Data that never changes, local to the object.
    fn constant(&mut self, name: &str, record: Record, mut data: DataDescription) -> Result<DataId, EmitError> {
        data.define(record.bytes.into_boxed_slice());
        data.set_align(8);
        let id = self.module.declare_data(name, Linkage::Local, false, false).map_err(EmitError::module)?;
        self.module.define_data(id, &data).map_err(EmitError::module)?;
        Ok(id)
    }

    fn descriptor(
        &mut self,
        plan: &Plan,
        targets: &[LevelTarget],
        entries: &[Entries],
        prefix: &str,
        key: [u8; 32],
    ) -> Result<(), EmitError> {
        let model = &plan.model;
        let name = self.text(&format!("{prefix}_name"), &model.name)?;

        let mut table = Record::new(size_of::<Level>() * targets.len());
        let mut data = DataDescription::new();
        for (i, (target, entry)) in targets.iter().zip(entries).enumerate() {
            let at = i * size_of::<Level>();
            table.put(at + offset_of!(Level, features), &target.level.features.to_le_bytes());
            let text = self.text(&format!("{prefix}_level{i}_name"), target.level.name)?;
            let text = self.module.declare_data_in_data(text, &mut data);
            data.write_data_addr(offset(at + offset_of!(Level, name)), text, 0);
            for (field, id) in [(offset_of!(Level, decode), entry.decode), (offset_of!(Level, batch), entry.batch)] {
                let function = self.module.declare_func_in_data(id, &mut data);
                data.write_function_addr(offset(at + field), function);
            }
        }
        let levels = self.constant(&format!("{prefix}_levels"), table, data)?;

        let stages = self.stages(&plan.levels[0], prefix)?;

        let mut record = Record::new(size_of::<ModelDescriptor>());
        let mut data = DataDescription::new();
        macro_rules! put {
            ($field:ident: $ty:ty = $value:expr) => {{
                let value = <$ty>::try_from($value).map_err(|_| EmitError::TooLarge(stringify!($field)))?;
                record.put(offset_of!(ModelDescriptor, $field), &value.to_le_bytes());
            }};
        }
        put!(magic: u64 = DESCRIPTOR_MAGIC);
        put!(abi_version: u32 = ABI_VERSION);
        put!(descriptor_bytes: u32 = size_of::<ModelDescriptor>());
        put!(level_count: u32 = targets.len());
        put!(hidden: u32 = model.hidden);
        put!(layers: u32 = model.layers);
        put!(heads: u32 = model.heads);
        put!(kv_heads: u32 = model.kv_heads);
        put!(head_dim: u32 = model.head_dim);
        put!(ffn: u32 = model.ffn);
        put!(experts: u32 = model.experts);
        put!(experts_per_token: u32 = model.experts_per_token);
        put!(vocab: u32 = model.vocab);
        put!(logits_stride: u32 = round_up(model.vocab, LANES));
        put!(context: u32 = model.context);
        put!(sliding_window: u32 = model.sliding_window.unwrap_or(0));
        put!(kv_type: u32 = model.kv as u32);
        put!(max_tokens: u32 = model.max_tokens);
        put!(page_tokens: u32 = PAGE_TOKENS);
        put!(page_bytes: u64 = plan.page_bytes());
        put!(scratch_bytes: u64 = plan.scratch_bytes);
        put!(worker_scratch_bytes: u64 = plan.worker_scratch_bytes);
        put!(routes_offset: u64 = plan.outputs.routes);
        put!(route_weights_offset: u64 = plan.outputs.route_weights);
        put!(final_hidden_offset: u64 = plan.outputs.final_hidden);
        put!(payload_bytes: u64 = plan.payload.bytes);
        put!(decode_weight_bytes: u64 = plan.costs.decode_weight_bytes);
        put!(multiply_adds_per_token: u64 = plan.costs.multiply_adds_per_token);
        put!(multiply_adds_per_logit_row: u64 = plan.costs.multiply_adds_per_logit_row);
        put!(arithmetic: u32 = plan.costs.integer_dot_products);
        put!(decode_stages: u32 = plan.levels[0].decode.stages.len());
        put!(batch_stages: u32 = plan.levels[0].batch.stages.len());
        record.put(offset_of!(ModelDescriptor, payload_key), &key);
        for (field, target) in [
            (offset_of!(ModelDescriptor, name), name),
            (offset_of!(ModelDescriptor, levels), levels),
            (offset_of!(ModelDescriptor, stages), stages),
        ] {
            let target = self.module.declare_data_in_data(target, &mut data);
            data.write_data_addr(offset(field), target, 0);
        }
        data.define(record.bytes.into_boxed_slice());
        data.set_align(8);
        let id = self
            .module
            .declare_data(&format!("{prefix}_model"), Linkage::Export, false, false)
            .map_err(EmitError::module)?;
        self.module.define_data(id, &data).map_err(EmitError::module)
    }
}

fn offset(n: usize) -> u32 {
    u32::try_from(n).expect("descriptors are small")
}

/// The bytes of a struct of the ABI, written field by field.
struct Record {
    bytes: Vec<u8>,
}

impl Record {
    fn new(size: usize) -> Record {
        Record { bytes: vec![0; size] }
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }
}
