//! Reads the text form ([`super::text`]) back: what was printed parses to an equal function.
//!
//! The text is taken as it is; whether the function makes sense is for [`super::verify`] to say.

use std::collections::BTreeMap;

use super::{Address, Binary, Compare, Function, Inst, Loop, Memory, Op, Reduce, Shift, Type, Value};

/// Why a text is no function.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct Error {
    /// The guilty line, from 1.
    pub line: usize,
    /// What was expected, and what was found.
    pub message: String,
}

/// Parses one function.
pub fn parse(text: &str) -> Result<Function, Error> {
    let lines = text.lines().enumerate().filter_map(|(i, line)| {
        let code = line.split_once(';').map_or(line, |(code, _)| code).trim();
        (!code.is_empty()).then_some((i + 1, code))
    });
    let mut parser = Parser { lines: lines.collect(), next: 0, types: BTreeMap::new(), last: text.lines().count() };
    parser.function()
}

struct Parser<'a> {
    /// Lines with code: number and code.
    lines: Vec<(usize, &'a str)>,
    next: usize,
    types: BTreeMap<u32, Type>,
    last: usize,
}

/// How a block ended.
struct End {
    next: Vec<Value>,
}

impl<'a> Parser<'a> {
    fn line(&mut self) -> Result<Line<'a>, Error> {
        let Some(&(number, rest)) = self.lines.get(self.next) else {
            return Err(Error { line: self.last, message: "the text ends, expected `}`".to_string() });
        };
        self.next += 1;
        Ok(Line { number, rest })
    }

    fn function(&mut self) -> Result<Function, Error> {
        let mut line = self.line()?;
        line.expect_word("kernel")?;
        let name = line.word("a name")?.to_string();
        line.expect("(")?;
        let mut params = Vec::new();
        while !line.accept(")") {
            if !params.is_empty() {
                line.expect(",")?;
            }
            let v = line.value()?;
            self.declare(&line, v, Type::Int)?;
            params.push((v, line.word("a name")?.to_string()));
        }
        line.expect("{")?;
        line.end()?;
        let (body, end) = self.block()?;
        if !end.next.is_empty() {
            return Err(line.error("`next` is for loops".to_string()));
        }
        if self.next < self.lines.len() {
            return Err(self.line()?.error("more text after the function's end".to_string()));
        }
        let count = self.types.len();
        if let Some(hole) = self.types.keys().zip(0..).find(|(v, i)| **v != *i) {
            return Err(line.error(format!("v{} is never defined, but {count} values are", hole.1)));
        }
        Ok(Function { name, params, types: self.types.values().copied().collect(), body })
    }

    fn declare(&mut self, line: &Line<'_>, v: Value, ty: Type) -> Result<(), Error> {
        match self.types.insert(v.0, ty) {
            Some(before) if before != ty => Err(line.error(format!("{v} is {ty} here and {before} before"))),
            _ => Ok(()),
        }
    }

    /// Instructions up to the closing brace.
    fn block(&mut self) -> Result<(Vec<Inst>, End), Error> {
        let mut block = Vec::new();
        loop {
            let mut line = self.line()?;
            if line.accept("}") {
                line.end()?;
                return Ok((block, End { next: Vec::new() }));
            }
            if line.accept_word("next") {
                let next = line.values()?;
                line.end()?;
                let mut line = self.line()?;
                line.expect("}")?;
                line.end()?;
                return Ok((block, End { next }));
            }
            block.push(self.inst(line)?);
        }
    }

    fn inst(&mut self, mut line: Line<'a>) -> Result<Inst, Error> {
        let mut results = Vec::new();
        if line.at_value() {
            loop {
                let (v, ty) = line.typed()?;
                self.declare(&line, v, ty)?;
                results.push(v);
                if !line.accept(",") {
                    break;
                }
            }
            line.expect("=")?;
        }
        let name = line.word("an operation")?;
        if name == "for" {
            return Ok(Inst { results, op: Op::For(Box::new(self.run_loop(line)?)) });
        }
        let op = line.op(name)?;
        line.end()?;
        Ok(Inst { results, op })
    }

    fn run_loop(&mut self, mut line: Line<'a>) -> Result<Loop, Error> {
        let (index, ty) = line.typed()?;
        self.declare(&line, index, ty)?;
        line.expect("=")?;
        let start = line.value()?;
        line.expect_word("to")?;
        let end = line.value()?;
        line.expect_word("step")?;
        let step = line.number()?;
        let (mut carried, mut initial) = (Vec::new(), Vec::new());
        if line.accept_word("with") {
            loop {
                let (v, ty) = line.typed()?;
                self.declare(&line, v, ty)?;
                carried.push(v);
                line.expect("=")?;
                initial.push(line.value()?);
                if !line.accept(",") {
                    break;
                }
            }
        }
        line.expect("{")?;
        line.end()?;
        let (body, end_of_body) = self.block()?;
        Ok(Loop { start, end, step, index, initial, carried, body, next: end_of_body.next })
    }
}

/// What is left of a line.
struct Line<'a> {
    number: usize,
    rest: &'a str,
}

impl<'a> Line<'a> {
    fn error(&self, message: String) -> Error {
        Error { line: self.number, message }
    }

    fn expected(&self, what: &str) -> Error {
        let found = if self.rest.is_empty() { "the end of the line".to_string() } else { format!("`{}`", self.rest) };
        self.error(format!("expected {what}, found {found}"))
    }

    fn accept(&mut self, punctuation: &str) -> bool {
        match self.rest.strip_prefix(punctuation) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, punctuation: &str) -> Result<(), Error> {
        if self.accept(punctuation) { Ok(()) } else { Err(self.expected(&format!("`{punctuation}`"))) }
    }

    /// The word that the rest starts with: letters, digits and `_`.
    fn peek(&self) -> &'a str {
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(self.rest.len());
        &self.rest[..end]
    }

    fn word(&mut self, what: &str) -> Result<&'a str, Error> {
        let word = self.peek();
        if word.is_empty() {
            return Err(self.expected(what));
        }
        self.rest = self.rest[word.len()..].trim_start();
        Ok(word)
    }

    fn accept_word(&mut self, word: &str) -> bool {
        let found = self.peek() == word;
        if found {
            self.rest = self.rest[word.len()..].trim_start();
        }
        found
    }

    fn expect_word(&mut self, word: &str) -> Result<(), Error> {
        if self.accept_word(word) { Ok(()) } else { Err(self.expected(&format!("`{word}`"))) }
    }

    fn end(&self) -> Result<(), Error> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.expected("the end of the line")) }
    }

    fn at_value(&self) -> bool {
        self.peek().strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok())
    }

    fn value(&mut self) -> Result<Value, Error> {
        match self.peek().strip_prefix('v').map(str::parse) {
            Some(Ok(n)) => {
                self.word("a value")?;
                Ok(Value(n))
            }
            _ => Err(self.expected("a value such as v3")),
        }
    }

    fn values(&mut self) -> Result<Vec<Value>, Error> {
        let mut values = vec![self.value()?];
        while self.accept(",") {
            values.push(self.value()?);
        }
        Ok(values)
    }

    fn operands<const N: usize>(&mut self) -> Result<[Value; N], Error> {
        let mut values = [Value(0); N];
        for (i, v) in values.iter_mut().enumerate() {
            if i > 0 {
                self.expect(",")?;
            }
            *v = self.value()?;
        }
        Ok(values)
    }

    fn typed(&mut self) -> Result<(Value, Type), Error> {
        let v = self.value()?;
        self.expect(":")?;
        Ok((v, self.ty()?))
    }

    fn ty(&mut self) -> Result<Type, Error> {
        let Some(ty) = Type::from_name(self.peek()) else { return Err(self.expected("a type")) };
        self.word("a type")?;
        Ok(ty)
    }

    fn format(&mut self) -> Result<Memory, Error> {
        self.expect(".")?;
        let Some(format) = Memory::from_name(self.peek()) else {
            return Err(self.expected("f32, bf16, f16, i32 or i8"));
        };
        self.word("a format")?;
        Ok(format)
    }

    /// What `take` takes until a comma or the end.
    fn literal<T: std::str::FromStr>(&mut self, what: &str) -> Result<T, Error> {
        let end = self.rest.find([',', ' ', '{']).unwrap_or(self.rest.len());
        match self.rest[..end].parse() {
            Ok(n) => {
                self.rest = self.rest[end..].trim_start();
                Ok(n)
            }
            Err(_) => Err(self.expected(what)),
        }
    }

    fn number<T: std::str::FromStr>(&mut self) -> Result<T, Error> {
        self.literal("a number that fits")
    }

    fn numbers<T: std::str::FromStr>(&mut self) -> Result<Vec<T>, Error> {
        let mut numbers = vec![self.number()?];
        while self.accept(",") {
            numbers.push(self.number()?);
        }
        Ok(numbers)
    }

    fn f32_bits(&mut self) -> Result<u32, Error> {
        if let Some(hex) = self.rest.strip_prefix("0x") {
            let bits = u32::from_str_radix(hex, 16).map_err(|_| self.expected("the bits of an f32"))?;
            self.rest = "";
            return Ok(bits);
        }
        self.literal::<f32>("an f32").map(f32::to_bits)
    }

    fn address(&mut self) -> Result<Address, Error> {
        let base = self.value()?;
        let sign: i64 = if self.accept("+") {
            1
        } else if self.accept("-") {
            -1
        } else {
            return Ok(Address { base, offset: 0 });
        };
        let distance = i64::from(self.number::<u32>()?);
        let offset = i32::try_from(sign * distance).map_err(|_| self.error("an offset exceeds 32 bits".to_string()))?;
        Ok(Address { base, offset })
    }

    fn stored(&mut self) -> Result<(Memory, Value, Address), Error> {
        let format = self.format()?;
        let v = self.value()?;
        self.expect(",")?;
        Ok((format, v, self.address()?))
    }

    /// The operation called `name` with its operands.
    fn op(&mut self, name: &str) -> Result<Op, Error> {
        if let Some(op) = Binary::ALL.into_iter().find(|op| op.name() == name) {
            return self.operands().map(|[a, b]| Op::Binary(op, a, b));
        }
        if let Some(op) = Compare::ALL.into_iter().find(|op| op.name() == name) {
            return self.operands().map(|[a, b]| Op::Compare(op, a, b));
        }
        if let Some(op) = Shift::ALL.into_iter().find(|op| op.name() == name) {
            let a = self.value()?;
            self.expect(",")?;
            return Ok(Op::Shift(op, a, self.number()?));
        }
        if let Some(op) = [Reduce::Add, Reduce::Max].into_iter().find(|op| op.name() == name) {
            return Ok(Op::Reduce(op, self.value()?));
        }
        Ok(match name {
            "int" => Op::Int(self.number()?),
            "f32" => Op::F32(self.f32_bits()?),
            "lanes" => {
                let n: Vec<i32> = self.numbers()?;
                match n[..] {
                    [one] => Op::Lanes([one; 16]),
                    _ => Op::Lanes(n.try_into().map_err(|_| self.error("expected 1 or 16 numbers".to_string()))?),
                }
            }
            "sqrt" => Op::Sqrt(self.value()?),
            "abs" => Op::Abs(self.value()?),
            "round" => Op::Round(self.value()?),
            "fma" => self.operands().map(|[a, b, c]| Op::Fma(a, b, c))?,
            "select" => self.operands().map(|[c, a, b]| Op::Select(c, a, b))?,
            "splat" => Op::Splat(self.value()?),
            "int_to_float" => Op::IntToFloat(self.value()?),
            "float_to_int" => Op::FloatToInt(self.value()?),
            "bitcast" => {
                self.expect(".")?;
                Op::Bitcast(self.ty()?, self.value()?)
            }
            "dot_u8s8" => self.operands().map(|[acc, w, a]| Op::DotU8S8(acc, w, a))?,
            "dot_s8s8" => self.operands().map(|[acc, w, a]| Op::DotS8S8(acc, w, a))?,
            "nibble_low" => Op::NibbleLow(self.value()?),
            "nibble_high" => Op::NibbleHigh(self.value()?),
            "lookup" => {
                let a = self.value()?;
                self.expect(",")?;
                let table: Vec<u8> = self.numbers()?;
                Op::Lookup(table.try_into().map_err(|_| self.error("expected 16 numbers".to_string()))?, a)
            }
            "load" => Op::Load(self.format()?, self.address()?),
            "load_bytes" => Op::LoadBytes(self.address()?),
            "load_splat" => Op::LoadSplat(self.format()?, self.address()?),
            "load_splat_bytes" => Op::LoadSplatBytes(self.address()?),
            "load_scalar" => Op::LoadScalar(self.format()?, self.address()?),
            "load_int" => Op::LoadInt(self.address()?),
            "load_u32" => Op::LoadU32(self.address()?),
            "store" => self.stored().map(|(format, v, at)| Op::Store(format, v, at))?,
            "store_strided" => {
                let (format, v, at) = self.stored()?;
                self.expect(",")?;
                Op::StoreStrided(format, v, at, self.number()?)
            }
            "store_scalar" => self.stored().map(|(format, v, at)| Op::StoreScalar(format, v, at))?,
            "prefetch" => Op::Prefetch(self.address()?),
            _ => return Err(self.error(format!("no operation is named `{name}`"))),
        })
    }
}
