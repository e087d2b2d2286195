//! A program of the plan → the Cranelift IR of an entry point.
//!
//! The generated function is `void step(const Step *step, uint32_t worker)` ([`moec_abi::StepFn`]). It loads the step's fields once,
//! then does the program's stages: loops and address arithmetic in scalar code, kernels by direct calls, the caller's barrier by an indirect one. Every
//! worker runs it with its own index. Deliberately absent: choices; the program says everything.

use crate::kernels::Kernel;
use crate::plan::buffers::Scope;
use crate::plan::program::{Action, Arith, Expr, Field, Program, Var};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AbiParam, Block, FuncRef, Function, InstBuilder, MemFlagsData, SigRef, Signature, Type, UserFuncName, Value, types,
};
use cranelift_codegen::isa::{CallConv, TargetFrontendConfig};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext, Switch, Variable};
use moec_abi::Step;
use std::collections::HashMap;
use std::mem::offset_of;

/// An address, and every integer of a program, is 64 bits wide.
const WORD: Type = types::I64;

/// The signature of an entry point.
pub fn entry_signature(call_conv: CallConv) -> Signature {
    let mut sig = Signature::new(call_conv);
    sig.params.push(AbiParam::new(WORD));
    sig.params.push(AbiParam::new(types::I32));
    sig
}

/// The signature of a kernel with `params` parameters.
pub fn kernel_signature(call_conv: CallConv, params: usize) -> Signature {
    let mut sig = Signature::new(call_conv);
    sig.params.extend((0..params).map(|_| AbiParam::new(WORD)));
    sig
}

/// Sizes that the entry point needs to find its memory.
#[derive(Clone, Copy, Debug)]
pub struct ScratchSizes {
    /// Bytes of shared scratch, before the workers' own.
    pub shared: usize,
    /// Bytes of each worker's own scratch.
    pub worker: usize,
}

/// Builds the entry point that runs `program`. `import` declares a kernel in the function and returns its reference.
pub fn build_step(
    name: UserFuncName,
    program: &Program,
    sizes: ScratchSizes,
    target: TargetFrontendConfig,
    context: &mut FunctionBuilderContext,
    mut import: impl FnMut(&Kernel, &mut Function) -> FuncRef,
) -> Function {
    let call_conv = target.default_call_conv;
    let mut function = Function::with_name_signature(name, entry_signature(call_conv));
    let kernels: HashMap<Kernel, FuncRef> =
        program.kernels().into_iter().map(|k| (k.clone(), import(&k, &mut function))).collect();
    let mut builder = FunctionBuilder::new(&mut function, context);
    let entry = builder.create_block();
    builder.append_block_params_for_function_params(entry);
    builder.switch_to_block(entry);
    builder.seal_block(entry);
    let mut lowering = Lowering::new(builder, entry, program, sizes, kernels, call_conv);
    for stage in &program.stages {
        lowering.actions(&stage.actions);
        if stage.barrier {
            lowering.barrier();
        }
    }
    lowering.builder.ins().return_(&[]);
    lowering.builder.finalize(target);
    function
}

struct Lowering<'a> {
    builder: FunctionBuilder<'a>,
    fields: HashMap<Field, Variable>,
    vars: HashMap<Var, Variable>,
    kernels: HashMap<Kernel, FuncRef>,
    buffers: Vec<(Field, i64)>,
    weights: Vec<i64>,
    worker: Value,
    barrier: Variable,
    barrier_context: Variable,
    barrier_signature: SigRef,
}

impl<'a> Lowering<'a> {
    fn new(
        mut builder: FunctionBuilder<'a>,
        entry: Block,
        program: &Program,
        sizes: ScratchSizes,
        kernels: HashMap<Kernel, FuncRef>,
        call_conv: CallConv,
    ) -> Self {
        let params = builder.block_params(entry).to_vec();
        let (step, worker) = (params[0], params[1]);
        let mut signature = Signature::new(call_conv);
        signature.params.push(AbiParam::new(WORD));
        signature.params.push(AbiParam::new(types::I32));
        let barrier_signature = builder.import_signature(signature);
        let declare = |builder: &mut FunctionBuilder, value: Value| {
            let v = builder.declare_var(WORD);
            builder.def_var(v, value);
            v
        };
        let pointer = |builder: &mut FunctionBuilder, offset: usize| {
            let at = i32::try_from(offset).expect("a step is small");
            builder.ins().load(WORD, MemFlagsData::trusted(), step, at)
        };
        let count = |builder: &mut FunctionBuilder, offset: usize| {
            let at = i32::try_from(offset).expect("a step is small");
            builder.ins().uload32(MemFlagsData::trusted(), step, at)
        };
        let mut fields = HashMap::new();
        for (field, offset) in [
            (Field::Payload, offset_of!(Step, payload)),
            (Field::Scratch, offset_of!(Step, scratch)),
            (Field::TokenIds, offset_of!(Step, token_ids)),
            (Field::Positions, offset_of!(Step, positions)),
            (Field::PageTables, offset_of!(Step, page_tables)),
            (Field::LogitRows, offset_of!(Step, logit_rows)),
            (Field::Logits, offset_of!(Step, logits)),
        ] {
            let value = pointer(&mut builder, offset);
            fields.insert(field, declare(&mut builder, value));
        }
        for (field, offset) in [
            (Field::Workers, offset_of!(Step, workers)),
            (Field::Tokens, offset_of!(Step, tokens)),
            (Field::LogitCount, offset_of!(Step, logit_count)),
        ] {
            let value = count(&mut builder, offset);
            fields.insert(field, declare(&mut builder, value));
        }
        let index = builder.ins().uextend(WORD, worker);
        fields.insert(Field::Worker, declare(&mut builder, index));
        let scratch = builder.use_var(fields[&Field::Scratch]);
        let own = builder.ins().imul_imm_u(index, sizes.worker as i64);
        let own = builder.ins().iadd_imm_u(own, sizes.shared as i64);
        let own = builder.ins().iadd(scratch, own);
        fields.insert(Field::WorkerScratch, declare(&mut builder, own));
        let value = pointer(&mut builder, offset_of!(Step, barrier));
        let barrier = declare(&mut builder, value);
        let value = pointer(&mut builder, offset_of!(Step, barrier_context));
        let barrier_context = declare(&mut builder, value);
        let vars = (0..program.vars).map(|i| (Var(i), builder.declare_var(WORD))).collect();
        let signed = |n: usize| i64::try_from(n).expect("offsets fit 63 bits");
        let buffers = program
            .buffers
            .all
            .iter()
            .map(|b| match b.scope {
                Scope::Shared => (Field::Scratch, signed(b.offset)),
                Scope::Worker => (Field::WorkerScratch, signed(b.offset)),
            })
            .collect();
        let weights = program.weights.iter().map(|w| signed(w.offset)).collect();
        Lowering {
            builder,
            fields,
            vars,
            kernels,
            buffers,
            weights,
            worker,
            barrier,
            barrier_context,
            barrier_signature,
        }
    }

    fn barrier(&mut self) {
        let callee = self.builder.use_var(self.barrier);
        let context = self.builder.use_var(self.barrier_context);
        self.builder.ins().call_indirect(self.barrier_signature, callee, &[context, self.worker]);
    }

    fn actions(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Let(var, expr) => {
                    let value = self.expr(expr);
                    self.builder.def_var(self.vars[var], value);
                }
                Action::Call(kernel, args) => {
                    let args: Vec<Value> = args.iter().map(|a| self.expr(a)).collect();
                    let callee = self.kernels[kernel];
                    self.builder.ins().call(callee, &args);
                }
                Action::Loop { var, from, to, step, body } => self.counted_loop(*var, from, to, *step, body),
                Action::Switch { on, cases } => self.switch(on, cases),
            }
        }
    }

    fn counted_loop(&mut self, var: Var, from: &Expr, to: &Expr, step: i64, body: &[Action]) {
        let (head, inside, after) =
            (self.builder.create_block(), self.builder.create_block(), self.builder.create_block());
        let variable = self.vars[&var];
        let first = self.expr(from);
        let last = self.expr(to);
        let end = self.builder.declare_var(WORD);
        self.builder.def_var(end, last);
        self.builder.def_var(variable, first);
        self.builder.ins().jump(head, &[]);

        self.builder.switch_to_block(head);
        let at = self.builder.use_var(variable);
        let last = self.builder.use_var(end);
        let more = self.builder.ins().icmp(IntCC::SignedLessThan, at, last);
        self.builder.ins().brif(more, inside, &[], after, &[]);

        self.builder.switch_to_block(inside);
        self.builder.seal_block(inside);
        self.actions(body);
        let at = self.builder.use_var(variable);
        let next = self.builder.ins().iadd_imm_s(at, step);
        self.builder.def_var(variable, next);
        self.builder.ins().jump(head, &[]);
        self.builder.seal_block(head);

        self.builder.switch_to_block(after);
        self.builder.seal_block(after);
    }

    fn switch(&mut self, on: &Expr, cases: &[Vec<Action>]) {
        let index = self.expr(on);
        let after = self.builder.create_block();
        let mut switch = Switch::new();
        let blocks: Vec<(Block, &Vec<Action>)> = cases
            .iter()
            .enumerate()
            .filter(|(_, actions)| !actions.is_empty())
            .map(|(i, actions)| {
                let block = self.builder.create_block();
                switch.set_entry(i as u128, block);
                (block, actions)
            })
            .collect();
        switch.emit(&mut self.builder, index, after);
        for (block, actions) in blocks {
            self.builder.switch_to_block(block);
            self.builder.seal_block(block);
            self.actions(actions);
            self.builder.ins().jump(after, &[]);
        }
        self.builder.switch_to_block(after);
        self.builder.seal_block(after);
    }

    fn expr(&mut self, expr: &Expr) -> Value {
        match expr {
            Expr::Int(n) => self.builder.ins().iconst(WORD, *n),
            Expr::Var(v) => self.builder.use_var(self.vars[v]),
            Expr::Field(f) => self.builder.use_var(self.fields[f]),
            Expr::Buffer(id) => {
                let (base, offset) = self.buffers[id.0];
                let base = self.builder.use_var(self.fields[&base]);
                self.builder.ins().iadd_imm_u(base, offset)
            }
            Expr::Weight(i) => {
                let base = self.builder.use_var(self.fields[&Field::Payload]);
                self.builder.ins().iadd_imm_u(base, self.weights[*i])
            }
            Expr::LoadU32(at) => {
                let at = self.expr(at);
                self.builder.ins().uload32(MemFlagsData::trusted(), at, 0)
            }
            Expr::LoadAddress(at) => {
                let at = self.expr(at);
                self.builder.ins().load(WORD, MemFlagsData::trusted(), at, 0)
            }
            Expr::Arith(op, a, b) => {
                let (a, b) = (self.expr(a), self.expr(b));
                let ins = self.builder.ins();
                match op {
                    Arith::Add => ins.iadd(a, b),
                    Arith::Sub => ins.isub(a, b),
                    Arith::Mul => ins.imul(a, b),
                    Arith::Div => ins.udiv(a, b),
                    Arith::Min => ins.smin(a, b),
                    Arith::Max => ins.smax(a, b),
                }
            }
        }
    }
}
