//! The verifier: what must hold of every function, whoever wrote it.
//!
//! Values are defined once, before they are used, and seen only in the block of their definition and the blocks inside it;
//! operands have the types that their operation takes ([`super::rules`]); loops give and take as many values as they carry.
//! Deliberately absent: whether accesses are within memory, which the evaluator tells.

use super::{Function, Inst, Loop, Op, Type, Value, rules, text};

/// What is wrong with a function.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("bug in moec: kernel `{function}`, line {line}, `{text}`: {message}")]
pub struct Error {
    /// The function's name.
    pub function: String,
    /// The guilty line of its text, from 1.
    pub line: usize,
    /// That line.
    pub text: String,
    /// What is wrong with it.
    pub message: String,
}

impl Error {
    /// The text of the function with the error below the guilty line.
    pub fn annotate(&self, function: &Function) -> String {
        let mut annotated = String::new();
        for (i, line) in function.to_string().lines().enumerate() {
            annotated.push_str(line);
            annotated.push('\n');
            if i + 1 == self.line {
                let indent = line.len() - line.trim_start().len();
                let width = line.trim().len();
                annotated.push_str(&format!("{:indent$}{:^<width$}\n", "", ""));
                annotated.push_str(&format!("{:indent$}error: {}\n", "", self.message));
            }
        }
        annotated
    }
}

/// Checks `function`.
pub fn verify(function: &Function) -> Result<(), Error> {
    let mut verifier = Verifier { function, states: vec![State::Undefined; function.types.len()], line: 1 };
    verifier.whole().map_err(|(line, text, message)| Error { function: function.name.clone(), line, text, message })
}

type Fault = (usize, String, String);

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Undefined,
    Visible,
    /// Defined in a loop that has ended.
    Gone,
}

struct Verifier<'a> {
    function: &'a Function,
    states: Vec<State>,
    line: usize,
}

impl Verifier<'_> {
    fn whole(&mut self) -> Result<(), Fault> {
        let function = self.function;
        let header = || text::header(function);
        let names = function.params.iter().map(|(_, name)| name).chain([&function.name]);
        for name in names {
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                return Err((1, header(), format!("`{name}` is no name: letters, digits and _ only")));
            }
        }
        for (v, name) in &function.params {
            self.define(*v).map_err(|e| (1, header(), e))?;
            if function.ty(*v) != Type::Int {
                return Err((1, header(), format!("parameter {name} is {}, expected int", function.ty(*v))));
            }
        }
        self.line = 2;
        self.block(&function.body)?;
        match self.states.iter().position(|s| *s == State::Undefined) {
            Some(v) => Err((1, header(), format!("v{v} has a type and no definition"))),
            None => Ok(()),
        }
    }

    fn block(&mut self, block: &[Inst]) -> Result<(), Fault> {
        for inst in block {
            let line = self.line;
            let fault = |message: String| (line, text::line(self.function, inst), message);
            self.uses(&inst.op).map_err(fault)?;
            if let Op::For(l) = &inst.op {
                self.loop_header(l, &inst.results).map_err(fault)?;
                self.loop_body(inst, l)?;
            } else {
                let wanted = rules::result_type(&inst.op, &self.function.types).map_err(fault)?;
                self.result_types(wanted.as_slice(), &inst.results).map_err(fault)?;
                self.line += 1;
            }
            for &r in &inst.results {
                self.define(r).map_err(|message| (line, text::line(self.function, inst), message))?;
            }
        }
        Ok(())
    }

    fn loop_header(&self, l: &Loop, results: &[Value]) -> Result<(), String> {
        let ty = |v: Value| self.function.types.get(v.0 as usize).copied();
        for v in [l.start, l.end, l.index] {
            if ty(v) != Some(Type::Int) {
                return Err(format!("{v} counts a loop, expected int"));
            }
        }
        if l.step <= 0 {
            return Err(format!("the step is {}, expected a positive number", l.step));
        }
        if l.carried.len() != l.initial.len() {
            return Err(format!("{} values are carried, {} given", l.carried.len(), l.initial.len()));
        }
        for (&c, &i) in l.carried.iter().zip(&l.initial) {
            if ty(c) != ty(i) {
                return Err(format!("{c} and {i}, which it starts as, differ in type"));
            }
        }
        let carried: Vec<Type> = l.carried.iter().filter_map(|&c| ty(c)).collect();
        self.result_types(&carried, results)
    }

    fn loop_body(&mut self, inst: &Inst, l: &Loop) -> Result<(), Fault> {
        let before: Vec<State> = self.states.clone();
        let header = self.line;
        for v in [l.index].iter().chain(&l.carried) {
            self.define(*v).map_err(|message| (header, text::line(self.function, inst), message))?;
        }
        self.line += 1;
        self.block(&l.body)?;
        self.next(l).map_err(|message| (self.line, text::next_line(l), message))?;
        // The line of `next`, when there is one, and that of the brace.
        self.line += usize::from(!l.next.is_empty()) + 1;
        for (state, before) in self.states.iter_mut().zip(before) {
            if *state != before {
                *state = State::Gone;
            }
        }
        Ok(())
    }

    fn next(&self, l: &Loop) -> Result<(), String> {
        if l.next.len() != l.carried.len() {
            return Err(format!("{} values are carried on, expected {}", l.next.len(), l.carried.len()));
        }
        for (&n, &c) in l.next.iter().zip(&l.carried) {
            self.visible(n)?;
            let (tn, tc) = (self.function.ty(n), self.function.ty(c));
            if tn != tc {
                return Err(format!("{n} is {tn} and becomes {c}, which is {tc}"));
            }
        }
        Ok(())
    }

    fn result_types(&self, wanted: &[Type], results: &[Value]) -> Result<(), String> {
        if results.len() != wanted.len() {
            return Err(format!("{} results, expected {}", results.len(), wanted.len()));
        }
        for (&r, &want) in results.iter().zip(wanted) {
            match self.function.types.get(r.0 as usize) {
                Some(&ty) if ty == want => {}
                Some(ty) => return Err(format!("{r} is {ty}, expected {want}")),
                None => return Err(format!("{r} has no type")),
            }
        }
        Ok(())
    }

    fn uses(&self, op: &Op) -> Result<(), String> {
        let mut result = Ok(());
        op.for_each_operand(|v| {
            if result.is_ok() {
                result = self.visible(v);
            }
        });
        result
    }

    fn visible(&self, v: Value) -> Result<(), String> {
        match self.states.get(v.0 as usize) {
            Some(State::Visible) => Ok(()),
            Some(State::Gone) => Err(format!("{v} was defined in a loop that has ended")),
            Some(State::Undefined) | None => Err(format!("{v} is used before it is defined")),
        }
    }

    fn define(&mut self, v: Value) -> Result<(), String> {
        match self.states.get_mut(v.0 as usize) {
            Some(state @ State::Undefined) => {
                *state = State::Visible;
                Ok(())
            }
            Some(_) => Err(format!("{v} is defined twice")),
            None => Err(format!("{v} has no type")),
        }
    }
}
