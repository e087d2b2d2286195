/* Runs a compiled model without any runtime: the object, its weights, and this program's own memory, threads and barrier.
 *
 *     bare WEIGHTS THREADS NEW_TOKENS ID...
 *
 * feeds the token ids as one batch, continues greedily one token at a time, and prints the new ids. The second line is a hash over the bits
 * of all logits: it is the same for every number of threads and on every CPU. C11, and C++ as well. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* for mmap under -std=c11 */
#endif
#include "numerals.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

/* The barrier of this program: the last one to come opens the next round. */
typedef struct {
    uint32_t workers, arrived, round;
} barrier;

static void meet(void *context, uint32_t worker) {
    barrier *b = (barrier *)context;
    uint32_t round = __atomic_load_n(&b->round, __ATOMIC_RELAXED);
    (void)worker;
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == b->workers) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->round, round + 1, __ATOMIC_RELEASE);
    } else {
        while (__atomic_load_n(&b->round, __ATOMIC_ACQUIRE) == round) sched_yield();
    }
}

/* What the CPU has, as bits of moec_level.features. */
static uint64_t cpu_features(void) {
    uint64_t f = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt")) f |= MOEC_FEATURE_X86_64_V2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) f |= MOEC_FEATURE_AVX2 | MOEC_FEATURE_F16C;
    if (__builtin_cpu_supports("fma")) f |= MOEC_FEATURE_FMA;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        f |= MOEC_FEATURE_AVX512;
    if (__builtin_cpu_supports("avx512vnni")) f |= MOEC_FEATURE_AVX512_VNNI;
    if (__builtin_cpu_supports("avx512bf16")) f |= MOEC_FEATURE_AVX512_BF16;
    if (__builtin_cpu_supports("avx512vbmi")) f |= MOEC_FEATURE_AVX512_VBMI;
    if (__builtin_cpu_supports("avxvnni")) f |= MOEC_FEATURE_AVX_VNNI;
#elif defined(__aarch64__)
    f |= MOEC_FEATURE_NEON;
    if (getauxval(AT_HWCAP) & (1UL << 20)) f |= MOEC_FEATURE_DOTPROD; /* HWCAP_ASIMDDP */
    if (getauxval(AT_HWCAP2) & (1UL << 13)) f |= MOEC_FEATURE_I8MM;   /* HWCAP2_I8MM */
#endif
    return f;
}

static void fail(const char *what) {
    fprintf(stderr, "bare: %s\n", what);
    exit(1);
}

/* Aligned memory, all zero. */
static void *zeros(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("out of memory");
    return memory;
}

/* One thread's share of a step. */
typedef struct {
    const moec_step *step;
    moec_step_fn entry;
    uint32_t worker;
} share;

static void *work(void *argument) {
    const share *s = (const share *)argument;
    s->entry(s->step, s->worker);
    return NULL;
}

static void run(const moec_level *level, const moec_step *step) {
    pthread_t threads[64];
    share shares[64];
    uint32_t i;
    for (i = 0; i < step->workers; i++) {
        shares[i].step = step;
        shares[i].entry = step->tokens == 1 ? level->decode : level->batch;
        shares[i].worker = i;
        if (i > 0 && pthread_create(&threads[i], NULL, work, &shares[i]) != 0) fail("cannot start a thread");
    }
    work(&shares[0]);
    for (i = 1; i < step->workers; i++) pthread_join(threads[i], NULL);
}

int main(int argc, char **argv) {
    static uint32_t ids[NUMERALS_CONTEXT], positions[NUMERALS_CONTEXT], rows[NUMERALS_CONTEXT];
    static uint8_t *table[NUMERALS_PAGES(NUMERALS_CONTEXT)];
    static uint8_t *const *tables[NUMERALS_CONTEXT];
    const moec_model_descriptor *model = &numerals_model;
    const moec_level *level = NULL;
    moec_step step;
    barrier b = {0, 0, 0};
    struct stat status;
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    uint32_t count = 0, new_tokens, i;
    int file;

    if (argc < 5 || argc - 4 > NUMERALS_CONTEXT) fail("usage: bare WEIGHTS THREADS NEW_TOKENS ID...");
    b.workers = (uint32_t)atoi(argv[2]);
    new_tokens = (uint32_t)atoi(argv[3]);
    if (b.workers < 1 || b.workers > 64) fail("THREADS is 1 to 64");
    for (i = 4; i < (uint32_t)argc; i++) {
        long id = atol(argv[i]);
        if (id < 0 || id >= NUMERALS_VOCAB) fail("a token id is outside the vocabulary");
        ids[count++] = (uint32_t)id;
    }

    /* The object and this header are of one version, and the CPU can run one of its levels. */
    if (model->magic != MOEC_DESCRIPTOR_MAGIC || model->abi_version != MOEC_ABI_VERSION ||
        model->descriptor_bytes != sizeof *model)
        fail("the object was compiled for another version of the interface");
    for (i = 0; i < model->level_count && level == NULL; i++)
        if ((model->levels[i].features & ~cpu_features()) == 0) level = &model->levels[i];
    if (level == NULL) fail("the model was compiled for another CPU");

    /* The weights are those of the object. */
    file = open(argv[1], O_RDONLY);
    if (file < 0 || fstat(file, &status) != 0) fail("cannot open the weights");
    if ((uint64_t)status.st_size != NUMERALS_PAYLOAD_BYTES) fail("the weights have the wrong size");
    memset(&step, 0, sizeof step);
    step.payload = (const uint8_t *)mmap(NULL, NUMERALS_PAYLOAD_BYTES, PROT_READ, MAP_PRIVATE, file, 0);
    if (step.payload == MAP_FAILED) fail("cannot map the weights");
    if (memcmp(((const moec_payload_header *)(const void *)step.payload)->key, model->payload_key, 32) != 0)
        fail("the weights belong to another model");

    /* Memory: scratch for the workers, a page of keys and values for every 64 tokens, and rows of logits. */
    step.scratch = (uint8_t *)zeros(NUMERALS_SCRATCH_BYTES(b.workers));
    for (i = 0; i < NUMERALS_PAGES(NUMERALS_CONTEXT); i++) table[i] = (uint8_t *)zeros(NUMERALS_PAGE_BYTES);
    for (i = 0; i < NUMERALS_CONTEXT; i++) {
        positions[i] = i;
        rows[i] = i;
        tables[i] = table;
    }
    step.logits = (float *)zeros(sizeof(float) * NUMERALS_LOGITS_STRIDE * NUMERALS_MAX_TOKENS);
    step.logit_rows = rows;
    step.page_tables = tables;
    step.barrier = meet;
    step.barrier_context = &b;
    step.workers = b.workers;

    /* The prompt goes through in steps of up to MAX_TOKENS, each new token in a step of its own. */
    for (i = 0; i < count && i < NUMERALS_CONTEXT;) {
        const float *last;
        uint32_t k, best = 0;
        step.tokens = count - i < NUMERALS_MAX_TOKENS ? count - i : NUMERALS_MAX_TOKENS;
        step.logit_count = step.tokens;
        step.token_ids = ids + i;
        step.positions = positions + i;
        run(level, &step);
        i += step.tokens;
        for (k = 0; k < step.tokens; k++) {
            const uint8_t *bytes = (const uint8_t *)(step.logits + (size_t)k * NUMERALS_LOGITS_STRIDE);
            size_t at;
            for (at = 0; at < sizeof(float) * NUMERALS_VOCAB; at++) hash = (hash ^ bytes[at]) * UINT64_C(0x100000001b3);
        }
        if (i < count || new_tokens == 0 || count == NUMERALS_CONTEXT) continue;
        last = step.logits + (size_t)(step.tokens - 1) * NUMERALS_LOGITS_STRIDE;
        for (k = 1; k < NUMERALS_VOCAB; k++)
            if (last[k] > last[best]) best = k;
        printf("%u ", best);
        ids[count++] = best;
        new_tokens--;
    }
    printf("\n%016llx\n", (unsigned long long)hash);
    return 0;
}
