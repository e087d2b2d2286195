/* moec.h: run models that moec compiled. C11, or C++.
 *
 * A program includes this header and that of each of its models, and links the model's library:
 *
 *     moec_model *model;
 *     moec_session *session;
 *     if (moec_open(&mixtral_model, "mixtral.weights", NULL, &model) != MOEC_OK) puts(moec_error_text());
 *     moec_session_new(model, &session);
 *     moec_feed(session, tokens, count);
 *     moec_generate(session, 100, callback, NULL, NULL);
 *     moec_session_free(session);
 *     moec_close(model);
 *
 * Ownership: what a function writes to a `**` place is the caller's, to be freed with the function that is named there. Nothing else is to be
 * freed. Pointers that are given to a function are used during the call only, unless it says otherwise.
 * Threads: every function may be called by any thread. Calls on one session must not overlap: the later one gets MOEC_BUSY. A model computes
 * on its own threads and the calling one; sessions of one model take turns, models do not wait for each other.
 * Errors: a function that can fail returns a moec_status and leaves a sentence for moec_error_text. Nothing prints, exits or aborts. A handle
 * that was freed gets MOEC_INVALID_HANDLE. Where a pointer is not said to be allowed to be null, null gets MOEC_INVALID_ARGUMENT.
 * Units: sizes are in elements of the array that they belong to; bytes where it is text or untyped memory.
 * Bits: logits depend on the model and the tokens, on nothing else: not on threads, chunks, forks, files or the CPU.
 *
 * Made from the crate moec-c; do not edit. */

#ifndef MOEC_H
#define MOEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct moec_model_descriptor moec_model_descriptor;

// Version of this API: functions and structs are only added, never changed, while it stays the same. A program compares it with
// `moec_api_version`.
#define MOEC_API_VERSION 1

// Stands in a last call for no token: only text that was held back.
#define MOEC_NO_TOKEN UINT32_MAX

// What a call came to. `moec_error_text` says more.
typedef enum moec_status {
    // Done.
    MOEC_OK = 0,
    // An argument is null or out of its range. Nothing was done.
    MOEC_INVALID_ARGUMENT = 1,
    // A handle was never given out, was freed, or is of another kind. Nothing was done.
    MOEC_INVALID_HANDLE = 2,
    // Another call is using the session. Nothing was done.
    MOEC_BUSY = 3,
    // The place for the result is too small. Nothing was written but the size that is needed.
    MOEC_TOO_SMALL = 4,
    // The object was compiled for another version of the interface, or its descriptor is damaged.
    MOEC_ABI_MISMATCH = 5,
    // The CPU cannot run the model's code.
    MOEC_CPU = 6,
    // The weights cannot be read, are damaged, or belong to another model.
    MOEC_WEIGHTS = 7,
    // Not enough memory.
    MOEC_OUT_OF_MEMORY = 8,
    // Threads could not be started.
    MOEC_THREADS = 9,
    // The tokens do not fit into the context. The session is as before.
    MOEC_CONTEXT_FULL = 10,
    // A token id is outside the vocabulary. The session is as before.
    MOEC_BAD_TOKEN = 11,
    // The session cannot go back that far.
    MOEC_BAD_REWIND = 12,
    // The session has no logits: feed it first.
    MOEC_NO_LOGITS = 13,
    // The model has no tokenizer, or it failed.
    MOEC_TOKENIZER = 14,
    // A text is not UTF-8.
    MOEC_NOT_UTF8 = 15,
    // The model has no chat template, or it failed, or it refuses the conversation.
    MOEC_CHAT = 16,
    // A session's file cannot be read or written.
    MOEC_FILE = 17,
    // A session's file is damaged, or belongs to another model.
    MOEC_BAD_SESSION_FILE = 18,
    // The call was cancelled, or a callback stopped it.
    MOEC_STOPPED = 19,
    // A bug in moec. The session or model that was used must be freed.
    MOEC_BUG = 20,
} moec_status;

// Which hidden states make the vector of a text.
typedef enum moec_pooling {
    // That of the last token, which has seen all others.
    MOEC_POOLING_LAST = 0,
    // The mean over all tokens.
    MOEC_POOLING_MEAN = 1,
} moec_pooling;

// An opened model. Not an address: it is refused after `moec_close`.
typedef struct moec_model moec_model;

// A sequence of tokens with its keys and values. Not an address: it is refused after `moec_session_free`.
typedef struct moec_session moec_session;

// How to open a model: begin with `moec_options_default` and change what should be different.
typedef struct moec_options {
    // Size of this struct, set by `moec_options_default`.
    size_t struct_bytes;
    // Threads that compute, the calling one included; 0 for one for each physical core that the process may use.
    uint32_t threads;
    // Not 0 to open a model whose weights are larger than the memory, and read them from the disk again and again.
    uint32_t low_memory;
    // Name of the CPU level whose code to run, a C string; null for the best that the CPU can run. Used during the call only.
    const char *level;
} moec_options;

// What a model is. The texts belong to the object that the model is in, and live as long as it.
typedef struct moec_model_info {
    // Its name.
    const char *name;
    // The CPU level whose code runs.
    const char *level;
    // Token ids are below this; also the number of logits.
    uint32_t vocab;
    // Most tokens of a session.
    uint32_t context;
    // Positions that a token sees, its own included; 0 for all.
    uint32_t sliding_window;
    // Elements of an embedding.
    uint32_t hidden;
    // Transformer blocks.
    uint32_t layers;
    // Experts of a layer; 0 for a dense model.
    uint32_t experts;
    // Experts of a token; 0 for a dense model.
    uint32_t experts_per_token;
    // Threads that compute.
    uint32_t threads;
    // The token that begins a text, or -1.
    int64_t bos_token;
    // Not 0 when text can be tokenized.
    uint32_t has_tokenizer;
    // Not 0 when there is a chat template.
    uint32_t has_chat_template;
} moec_model_info;

// Memory of a model, in bytes.
typedef struct moec_memory_use {
    // The weights, mapped from their file or where the program put them.
    uint64_t weights;
    // How much of them is in memory now.
    uint64_t weights_resident;
    // Scratch, taken when the model was opened.
    uint64_t scratch;
    // Keys and values that all sessions of the model hold now; shared ones count once.
    uint64_t kv;
    // One page of keys and values, for 64 tokens: what a session grows by.
    uint64_t kv_page;
    // The most keys and values that one session can hold.
    uint64_t kv_session_max;
} moec_memory_use;

// How tokens are chosen: begin with `moec_sampling_default` and change what should be different.
typedef struct moec_sampling {
    // Size of this struct, set by `moec_sampling_default`.
    size_t struct_bytes;
    // Divides the logits; 0 takes the most probable token always.
    float temperature;
    // Only the most probable tokens that together reach this probability; 1 for all.
    float top_p;
    // Only tokens at least this many times as probable as the best; 0 for all.
    float min_p;
    // Divides positive logits, and multiplies negative ones, of tokens among the last `repeat_last`; 1 for none.
    float repeat_penalty;
    // Only so many of the most probable tokens; 0 for all.
    uint32_t top_k;
    // How many of the session's last tokens `repeat_penalty` looks at.
    uint32_t repeat_last;
    // Seed of the random numbers: the same seed, logits and settings give the same tokens on every machine.
    uint64_t seed;
} moec_sampling;

// Called for each new token, in order, on the thread that called `moec_generate`: `token`; the piece of text that is certain now, `text_bytes` bytes
// of UTF-8 and a NUL, often empty (and always without a tokenizer), valid during the call; and `user` as given. Returns 0 to go on. It may use
// other sessions, but not this one, and must not be left by an exception or `longjmp`.
typedef int (*moec_generate_fn)(void *user, uint32_t token, const char *text, size_t text_bytes);

// One turn of a conversation.
typedef struct moec_message {
    // Who speaks, a C string: `system`, `user`, `assistant`, or what else the template knows.
    const char *role;
    // What is said, a C string in UTF-8.
    const char *content;
} moec_message;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The sentence of the last call on this thread that did not return `MOEC_OK`: what went wrong, with what was expected and what was found, and
// what to do. Never null; empty before the first failure. Valid until the next call of this API on the same thread that fails. Any thread may
// call it; each sees its own.
const char *moec_error_text(void);

// The version of the library that is linked, to be compared with `MOEC_API_VERSION` of the header. Any thread may call it.
uint32_t moec_api_version(void);

// Options as they are when nobody says otherwise. Any thread may call it.
struct moec_options moec_options_default(void);

// Opens a model whose weights are the file at `weights`, a C string.
//
// `descriptor` is `NAME_model` of the model's header. `options` may be null. The model goes to `*model`; free it with `moec_close`. The weights
// are mapped, so opening is fast, and the file must not be changed while the model is open. Any thread may call it; several models can be open.
//
// Errors: `MOEC_ABI_MISMATCH`, `MOEC_CPU`, `MOEC_WEIGHTS`, `MOEC_OUT_OF_MEMORY`, `MOEC_THREADS`, `MOEC_INVALID_ARGUMENT` for null.
enum moec_status moec_open(const moec_model_descriptor *descriptor,
                           const char *weights,
                           const struct moec_options *options,
                           struct moec_model **model);

// Opens a model whose weights are in memory: `bytes` bytes at `weights`, aligned to `MOEC_PAYLOAD_ALIGN`. The memory belongs to the caller, and
// must stay as it is until the model and all its sessions are freed. Otherwise as `moec_open`.
enum moec_status moec_open_memory(const moec_model_descriptor *descriptor,
                                  const void *weights,
                                  size_t bytes,
                                  const struct moec_options *options,
                                  struct moec_model **model);

// Opens a model whose weights are in the open file `fd`, from byte `offset` on, a multiple of `MOEC_PAYLOAD_ALIGN`. The file descriptor stays the
// caller's and can be closed after the call. Otherwise as `moec_open`.
enum moec_status moec_open_fd(const moec_model_descriptor *descriptor,
                              int fd,
                              uint64_t offset,
                              const struct moec_options *options,
                              struct moec_model **model);

// Closes a model; null is allowed. Its sessions stay good: what they use is freed with the last of them. Any thread may call it, at any time.
//
// Errors: `MOEC_INVALID_HANDLE` for a model that is not open.
enum moec_status moec_close(struct moec_model *model);

// Writes the first `info_bytes` bytes (`sizeof *info`) of what a model is to `*info`. Any thread may call it.
//
// Errors: `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null or a size that is not one of the struct's.
enum moec_status moec_info(const struct moec_model *model, struct moec_model_info *info, size_t info_bytes);

// Writes a model's memory to `*memory`, `memory_bytes` (`sizeof *memory`) bytes. Any thread may call it.
//
// Errors: as `moec_info`.
enum moec_status moec_memory(const struct moec_model *model, struct moec_memory_use *memory, size_t memory_bytes);

// Whether `token` ends a text: 1, 0, or -1 when the model is not open. Any thread may call it.
int moec_is_end(const struct moec_model *model, uint32_t token);

// The vector of a text: its final hidden states, pooled, not normalized, `moec_model_info.hidden` floats to `vector`, which has room for `capacity`.
// `*needed` (or null) takes how many there are. `pooling` is a `moec_pooling`. Any thread may call it; it waits for its turn.
//
// Errors: `MOEC_INVALID_ARGUMENT` for null or no tokens, `MOEC_BAD_TOKEN`, `MOEC_CONTEXT_FULL`, `MOEC_TOO_SMALL`, `MOEC_OUT_OF_MEMORY`.
enum moec_status moec_embed(const struct moec_model *model,
                            const uint32_t *tokens,
                            size_t count,
                            uint32_t pooling,
                            float *vector,
                            size_t capacity,
                            size_t *needed);

// Makes an empty session of `model` in `*session`; free it with `moec_session_free`. It takes no memory to speak of before tokens are fed. Any
// thread may call it. A session may move between threads, but is used by one call at a time: another one gets `MOEC_BUSY`. Steps of
// different sessions of a model take turns.
//
// Errors: `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null.
enum moec_status moec_session_new(const struct moec_model *model,
                                  struct moec_session **session);

// Frees a session; null is allowed. Other sessions, forks of it too, are not touched. Any thread may call it; a call that uses the session
// meanwhile goes on to its end.
//
// Errors: `MOEC_INVALID_HANDLE` for a session that is not open.
enum moec_status moec_session_free(struct moec_session *session);

// Sends `count` tokens through the model, after those that the session has. Afterwards `moec_logits` has the logits after the last of them. The
// result does not depend on how the tokens are divided among calls. No tokens are no error, and change nothing.
//
// Errors: `MOEC_BAD_TOKEN`, `MOEC_CONTEXT_FULL`, `MOEC_OUT_OF_MEMORY`: the session is as before. `MOEC_STOPPED` after `moec_cancel`: the session has
// some of the tokens (`moec_tokens`). `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_feed(struct moec_session *session,
                           const uint32_t *tokens,
                           size_t count);

// As `moec_feed`, and writes the logits after every one of the tokens to `logits`: `count` rows of `moec_model_info.vocab` floats. `capacity` is the
// number of floats that have room there.
//
// Errors: as `moec_feed`, and `MOEC_TOO_SMALL`: the session is as before.
enum moec_status moec_feed_all(struct moec_session *session,
                               const uint32_t *tokens,
                               size_t count,
                               float *logits,
                               size_t capacity);

// Writes the logits after the session's last token to `logits`: `moec_model_info.vocab` floats; `capacity` have room. `*needed` (or null) takes how many
// there are; with null `logits` and capacity 0 that is all.
//
// Errors: `MOEC_NO_LOGITS` for a session that was not fed, or not since `moec_rewind`; `MOEC_TOO_SMALL`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`,
// `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_logits(const struct moec_session *session,
                             float *logits,
                             size_t capacity,
                             size_t *needed);

// Writes the session's tokens to `tokens`; `capacity` have room. `*needed` (or null) takes how many there are; with null `tokens` and capacity 0
// that is all.
//
// Errors: `MOEC_TOO_SMALL`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_tokens(const struct moec_session *session,
                             uint32_t *tokens,
                             size_t capacity,
                             size_t *needed);

// Makes another session in `*fork` with the same tokens, logits and sampling (its random numbers begin anew), over shared keys and values: it is made
// at once, whatever the length, and memory is taken only where the two go different ways. Free both.
//
// Errors: `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null.
enum moec_status moec_fork(const struct moec_session *session,
                           struct moec_session **fork);

// Goes back to the first `count` tokens. The logits are gone then (unless all tokens stay): to choose again in the same place, go back one token
// more and feed that token again, or fork before.
//
// Errors: `MOEC_BAD_REWIND` when there are fewer tokens, or what a sliding window has left behind would be needed; the session is as before.
// `MOEC_BUSY`, `MOEC_INVALID_HANDLE`.
enum moec_status moec_rewind(struct moec_session *session,
                             size_t count);

// Writes the session (tokens, keys and values, logits; not the sampling) to the file `path`, which is replaced when all is written.
//
// Errors: `MOEC_FILE`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_save(const struct moec_session *session,
                           const char *file);

// Makes a session in `*session` from a file that `moec_save` wrote with the same model: it goes on with the same bits. Free it with
// `moec_session_free`.
//
// Errors: `MOEC_FILE`, `MOEC_BAD_SESSION_FILE`, `MOEC_OUT_OF_MEMORY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_load(const struct moec_model *model,
                           const char *file,
                           struct moec_session **session);

// Sampling as it is when nobody says otherwise: greedy. The other settings are those that take effect once `temperature` is above 0. Any thread may
// call it.
struct moec_sampling moec_sampling_default(void);

// Sets how the session chooses tokens, and begins its random numbers anew from `sampling->seed`.
//
// Errors: `MOEC_INVALID_ARGUMENT` for null, a struct not begun with `moec_sampling_default`, or a number out of its range. `MOEC_BUSY`,
// `MOEC_INVALID_HANDLE`.
enum moec_status moec_set_sampling(struct moec_session *session,
                                   const struct moec_sampling *sampling);

// Chooses a token by the session's logits and sampling, into `*token`. The session does not change but for its random numbers: feed the token to go
// on.
//
// Errors: `MOEC_NO_LOGITS`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null.
enum moec_status moec_sample(struct moec_session *session,
                             uint32_t *token);

// Makes a call that feeds this session now, on another thread, end soon with `MOEC_STOPPED`. Without such a call it has no effect. Any thread may call
// it, at any time.
//
// Errors: `MOEC_INVALID_HANDLE`.
enum moec_status moec_cancel(const struct moec_session *session);

// Goes on from the session's logits by its sampling, for at most `max_tokens` tokens (0 for as many as fit), until the model ends its text, the
// context is full, or `callback` returns something else than 0. Afterwards every token that the callback saw is in the session, so that
// another call goes on as if there had been one; a token that ends the text is neither shown nor fed. When text is left at the end, the callback gets
// it with the token `MOEC_NO_TOKEN`. `callback` may be null. `*generated` (or null) takes the number of tokens.
//
// Errors: `MOEC_NO_LOGITS`; `MOEC_STOPPED` when the callback or `moec_cancel` ended it; `MOEC_OUT_OF_MEMORY`, `MOEC_TOKENIZER`, `MOEC_BUSY`,
// `MOEC_INVALID_HANDLE`.
enum moec_status moec_generate(struct moec_session *session,
                               size_t max_tokens,
                               moec_generate_fn callback,
                               void *user,
                               size_t *generated);

// Writes the token ids of `bytes` bytes of UTF-8 `text` to `tokens`; `capacity` have room. `*needed` (or null) takes how many there are; with null
// `tokens` and capacity 0 that is all. With `special` not 0, with the ids that the tokenizer puts around a text (a bos token, usually): for a
// text that begins a session, and not for one from `moec_chat`. Any thread may call it.
//
// Errors: `MOEC_NOT_UTF8`, `MOEC_TOKENIZER`, `MOEC_TOO_SMALL`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_tokenize(const struct moec_model *model,
                               const char *text,
                               size_t bytes,
                               int special,
                               uint32_t *tokens,
                               size_t capacity,
                               size_t *needed);

// Writes the text of `count` tokens, without special tokens, and a NUL to `text`; `capacity` bytes have room. `*needed` (or null) takes the bytes of
// the text without the NUL; with null `text` and capacity 0 that is all. For text that grows token by token use `moec_generate`: a character
// may be spread over several tokens. Any thread may call it.
//
// Errors: `MOEC_BAD_TOKEN`, `MOEC_TOKENIZER`, `MOEC_TOO_SMALL`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_detokenize(const struct moec_model *model,
                                 const uint32_t *tokens,
                                 size_t count,
                                 char *text,
                                 size_t capacity,
                                 size_t *needed);

// Writes the text that the model's chat template makes of a conversation, and a NUL, to `text`; `capacity` bytes have room. `*needed` (or null) takes
// the bytes of the text without the NUL; with null `text` and capacity 0 that is all. With `answer` not 0 the text ends where the assistant
// begins to speak. It has its special tokens in it: tokenize it with `special` 0. Any thread may call it.
//
// Errors: `MOEC_CHAT`, `MOEC_NOT_UTF8`, `MOEC_TOO_SMALL`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
enum moec_status moec_chat(const struct moec_model *model,
                           const struct moec_message *messages,
                           size_t count,
                           int answer,
                           char *text,
                           size_t capacity,
                           size_t *needed);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MOEC_H */
