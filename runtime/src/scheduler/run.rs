//! The scheduler's thread: one round is one step.

use super::prefix::PrefixCache;
use super::request::Event;
use super::task::{Outcome, Share, Task};
use super::{Observer, Plan, Shared, StepReport, Submitted};
use crate::error::{Error, Result};
use crate::kv::Sequence;
use crate::model::Model;
use crate::step::{LogitRows, Part};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

/// Everything that the thread owns.
pub(super) struct Loop {
    model: Arc<Model>,
    plan: Plan,
    shared: Arc<Shared>,
    submitted: mpsc::Receiver<Option<Submitted>>,
    observer: Observer,
    /// In order of arrival; preempted ones come first.
    waiting: VecDeque<Task>,
    /// In order of arrival.
    running: Vec<Task>,
    cache: PrefixCache,
    /// KV pages that may be in use.
    pages: usize,
    rows: LogitRows,
    report: StepReport,
}

impl Loop {
    pub fn new(
        model: Arc<Model>,
        plan: Plan,
        shared: Arc<Shared>,
        submitted: mpsc::Receiver<Option<Submitted>>,
        observer: Observer,
    ) -> Loop {
        Loop {
            model,
            plan,
            shared,
            submitted,
            observer,
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache: PrefixCache::default(),
            pages: plan.pages,
            rows: LogitRows::with_hidden(),
            report: StepReport::default(),
        }
    }

    /// Runs until the scheduler is closed and nothing is left to do.
    pub fn run(mut self) {
        loop {
            self.receive();
            if self.shared.aborting.load(Ordering::SeqCst) {
                let tasks: Vec<Task> = self.waiting.drain(..).chain(self.running.drain(..)).collect();
                for task in tasks {
                    self.finish(task, Event::Failed(Error::Interrupted));
                }
            }
            self.forget_closed();
            self.admit();
            if !self.running.is_empty() {
                self.step();
            } else if self.shared.closing.load(Ordering::SeqCst) && self.waiting.is_empty() {
                return;
            }
        }
    }

    /// Takes in what was submitted; sleeps when there is nothing to do.
    fn receive(&mut self) {
        if self.running.is_empty() && self.waiting.is_empty() && !self.shared.closing.load(Ordering::SeqCst) {
            self.observe();
            match self.submitted.recv() {
                Ok(submitted) => self.take(submitted),
                // The scheduler is gone without a word: nobody waits for anything.
                Err(mpsc::RecvError) => self.shared.closing.store(true, Ordering::SeqCst),
            }
        }
        while let Ok(submitted) = self.submitted.try_recv() {
            self.take(submitted);
        }
    }

    fn take(&mut self, submitted: Option<Submitted>) {
        if let Some(Submitted { request, sink }) = submitted {
            self.waiting.push_back(Task::new(&self.model, self.plan.context, request, sink));
        }
    }

    fn finish(&mut self, mut task: Task, event: Event) {
        // First the place, then the word: who hears the word may submit the next request at once.
        self.shared.open.fetch_sub(1, Ordering::SeqCst);
        self.report.ended += 1;
        task.sink.send(event);
    }

    /// Gives up requests that nobody waits for.
    fn forget_closed(&mut self) {
        let before = self.waiting.len() + self.running.len();
        self.waiting.retain(|task| !task.sink.is_closed());
        self.running.retain(|task| !task.sink.is_closed());
        let gone = before - self.waiting.len() - self.running.len();
        self.shared.open.fetch_sub(gone, Ordering::SeqCst);
        self.report.ended += gone;
    }

    /// Lets waiting requests in, in order, while there are places and room for all their tokens and one more.
    fn admit(&mut self) {
        while self.running.len() < self.plan.parallel
            && let Some(next) = self.waiting.front()
        {
            let free = self.pages.saturating_sub(self.model.pages().pages_in_use()) + self.cache.evictable();
            let promised: usize = self.running.iter().map(|task| self.pages_to_come(task, 0)).sum();
            if self.pages_to_come(next, 1) > free.saturating_sub(promised) && !self.running.is_empty() {
                break;
            }
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Pages that `task` will still take for the tokens that it has and `more`.
    fn pages_to_come(&self, task: &Task, more: usize) -> usize {
        let window = self.model.descriptor().window();
        let most = Sequence::pages_for(task.tokens.len() + more, self.plan.chunk, window);
        most.saturating_sub(task.sequence.pages())
    }

    /// Chooses the tokens of the next step and makes room for their keys and values.
    fn share_out(&mut self) {
        let mut left = self.plan.chunk;
        self.running.iter_mut().for_each(|task| task.share = Share::default());
        // Answers first, in order of arrival, and then prompts; a preemption shortens the list.
        for decoding in [true, false] {
            if !decoding && self.running.iter().any(|task| task.share.tokens > 0) {
                left = left.min(self.plan.chunk_beside);
            }
            let mut index = 0;
            while index < self.running.len() && left > 0 {
                if self.running[index].is_decoding() == decoding && self.running[index].share.tokens == 0 {
                    left -= self.share(index, left);
                }
                index += 1;
            }
        }
        let mut row = 0;
        for task in &mut self.running {
            task.share.row = row;
            row += task.share.rows();
        }
    }

    /// Gives running request number `index` its part of the step, at most `most` tokens, with pages for them; returns how
    /// many. Requests behind it may be preempted for that, and at last itself.
    fn share(&mut self, index: usize, most: usize) -> usize {
        let task = &mut self.running[index];
        if self.plan.prefix_cache {
            let skippable = task.skippable();
            let added = self.cache.extend(&mut task.sequence, &task.tokens, skippable);
            self.report.cached_tokens += added;
            if task.is_first_reading() {
                task.cached += added;
            }
        }
        let tokens = task.remaining().min(most);
        if !self.make_room(index, tokens) {
            return 0;
        }
        let task = &mut self.running[index];
        task.share = Share { tokens, logits: task.wanted(tokens), row: 0, decoding: task.is_decoding() };
        tokens
    }

    /// Takes pages for `tokens` more tokens of running request number `index`. `false` when that request does not run any more.
    fn make_room(&mut self, index: usize, tokens: usize) -> bool {
        loop {
            let pool = self.model.pages();
            let sequence = &mut self.running[index].sequence;
            // Gives back what the window has left behind.
            sequence.prepare(0).ok();
            let wanted = sequence.pages_wanted(tokens);
            let alone = self.running.len() == 1 && self.cache.evictable() == 0;
            if wanted == 0 || alone || pool.pages_in_use() + wanted <= self.pages {
                let error = match self.running[index].sequence.prepare(tokens) {
                    Ok(()) => return true,
                    Err(error) => error,
                };
                if alone {
                    let task = self.running.remove(index);
                    self.finish(task, Event::Failed(error));
                    return false;
                }
                // The machine has less memory than was thought: go on with what there is.
                self.pages = pool.pages_in_use();
            } else if !self.cache.evict() {
                let last = self.running.len() - 1;
                self.preempt(last);
                if last == index {
                    return false;
                }
            }
        }
    }

    /// Takes all pages from running request number `index`; it waits, before all others, to be computed again.
    fn preempt(&mut self, index: usize) {
        let mut task = self.running.remove(index);
        task.preempt(&self.model);
        self.report.preempted += 1;
        self.waiting.push_front(task);
    }

    fn step(&mut self) {
        let started = Instant::now();
        self.share_out();
        let shares: Vec<Share> = self.running.iter().map(|task| task.share).collect();
        let tokens: usize = shares.iter().map(|share| share.tokens).sum();
        if tokens == 0 {
            return;
        }
        if let Err(error) = self.send_through() {
            // Pages and ids were checked, so this is memory for logits: without the newest request less is needed.
            let task = self.running.pop().expect("a step has requests");
            self.finish(task, Event::Failed(error));
            return;
        }
        self.report.tokens = tokens;
        self.report.requests = shares.iter().filter(|share| share.tokens > 0).count();
        self.report.prompt_tokens = shares.iter().filter(|share| !share.decoding).map(|share| share.tokens).sum();
        if self.plan.prefix_cache {
            for task in &self.running {
                let (end, page) = (task.sequence.len(), moec_abi::PAGE_TOKENS);
                if end / page > (end - task.share.tokens) / page {
                    self.cache.insert(&task.sequence, &task.tokens);
                }
            }
        }
        let before: usize = self.running.iter().map(|task| task.tokens.len()).sum();
        let outcomes = self.use_rows();
        self.report.generated = self.running.iter().map(|task| task.tokens.len()).sum::<usize>() - before;
        for (task, outcome) in std::mem::take(&mut self.running).into_iter().zip(outcomes) {
            match outcome {
                Outcome::Going => self.running.push(task),
                Outcome::Over(event) => self.finish(task, event),
            }
        }
        self.report.time = started.elapsed();
        self.observe();
    }

    fn send_through(&mut self) -> Result<()> {
        let taking_part = self.running.iter_mut().filter(|task| task.share.tokens > 0);
        let mut parts: Vec<Part<'_>> = taking_part
            .map(|task| {
                let tokens = &task.tokens[task.sequence.len()..][..task.share.tokens];
                Part { sequence: &mut task.sequence, tokens, logits: task.share.logits }
            })
            .collect();
        self.model.step(&mut parts, &mut self.rows, None)
    }

    /// Lets every task use its rows, on all workers.
    fn use_rows(&mut self) -> Vec<Outcome> {
        let rows = &self.rows;
        if self.running.iter().filter(|task| task.share.rows() > 0).count() < 2 || self.model.workers() == 1 {
            return self.running.iter_mut().map(|task| task.use_rows(rows)).collect();
        }
        let slots: Vec<_> = self.running.iter_mut().map(|task| Mutex::new((task, Outcome::Going))).collect();
        self.model.on_workers(&|worker| {
            for slot in slots.iter().skip(worker.index).step_by(worker.count) {
                let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
                let (task, outcome) = &mut *slot;
                *outcome = task.use_rows(rows);
            }
        });
        slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner).1).collect()
    }

    fn observe(&mut self) {
        let mut report = std::mem::take(&mut self.report);
        report.running = self.running.len();
        report.waiting = self.waiting.len();
        report.pages_in_use = self.model.pages().pages_in_use();
        report.pages_cached = self.cache.len();
        (self.observer)(&report);
    }
}
