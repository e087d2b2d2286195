/* Two models in one process, at once: by path, from memory and from a file descriptor; forks, files, going back, errors.
 *
 *     two_models NUMERALS.weights OTHER.weights DIRECTORY
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "moec.h"
#include "numerals.h"
#include "other.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPECT(condition)                                                                                                \
    do {                                                                                                                 \
        if (!(condition)) {                                                                                              \
            fprintf(stderr, "line %d: %s (moec says: %s)\n", __LINE__, #condition, moec_error_text());                   \
            exit(1);                                                                                                     \
        }                                                                                                                \
    } while (0)
#define OK(call) EXPECT((call) == MOEC_OK)

enum { PROMPT = 20, NEW = 30 };

typedef struct {
    moec_model *model;
    uint32_t vocab;
    uint32_t tokens[NEW];
    float *logits;
} run;

/* Feeds a fixed prompt, goes on greedily by hand, and keeps tokens and the last logits. */
static void *generate(void *argument) {
    run *r = (run *)argument;
    moec_session *session;
    uint32_t prompt[PROMPT], i;
    for (i = 0; i < PROMPT; i++) prompt[i] = (i * i * 7 + 5) % r->vocab;
    OK(moec_session_new(r->model, &session));
    OK(moec_feed(session, prompt, PROMPT));
    for (i = 0; i < NEW; i++) {
        OK(moec_sample(session, &r->tokens[i]));
        OK(moec_feed(session, &r->tokens[i], 1));
    }
    OK(moec_logits(session, r->logits, r->vocab, NULL));
    OK(moec_session_free(session));
    return NULL;
}

static run make(moec_model *model) {
    run r;
    moec_model_info info;
    memset(&r, 0, sizeof r);
    OK(moec_info(model, &info, sizeof info));
    r.model = model;
    r.vocab = info.vocab;
    r.logits = (float *)calloc(info.vocab, sizeof(float));
    return r;
}

static int same(const run *a, const run *b) {
    return memcmp(a->tokens, b->tokens, sizeof a->tokens) == 0 &&
           memcmp(a->logits, b->logits, a->vocab * sizeof(float)) == 0;
}

typedef struct {
    char text[512];
    size_t bytes, calls, limit;
} pieces;

static int collect(void *user, uint32_t token, const char *text, size_t bytes) {
    pieces *p = (pieces *)user;
    EXPECT(strlen(text) == bytes && p->bytes + bytes < sizeof p->text);
    memcpy(p->text + p->bytes, text, bytes + 1);
    p->bytes += bytes;
    p->calls += token != MOEC_NO_TOKEN;
    return p->limit != 0 && p->calls >= p->limit;
}

int main(int argc, char **argv) {
    moec_model *numerals, *other, *third;
    moec_session *a, *b, *c;
    moec_options options = moec_options_default();
    moec_sampling sampling = moec_sampling_default();
    moec_memory_use memory;
    pthread_t threads[4];
    run runs[4];
    pieces p;
    char path[4096], buffer[256];
    uint32_t tokens[64], more[64], id;
    float x[NUMERALS_VOCAB], y[NUMERALS_VOCAB], *rows;
    size_t count, n, i;
    void *bytes;
    int fd;

    EXPECT(argc == 4 && moec_api_version() == MOEC_API_VERSION);
    options.threads = 2;
    OK(moec_open(&numerals_model, argv[1], &options, &numerals));

    /* The other one from memory, and once more from a file descriptor that is closed afterwards. */
    fd = open(argv[2], O_RDONLY);
    EXPECT(fd >= 0);
    bytes = mmap(NULL, OTHER_PAYLOAD_BYTES, PROT_READ, MAP_PRIVATE, fd, 0);
    EXPECT(bytes != MAP_FAILED);
    OK(moec_open_memory(&other_model, bytes, OTHER_PAYLOAD_BYTES, &options, &other));
    options.threads = 1;
    OK(moec_open_fd(&other_model, fd, 0, &options, &third));
    close(fd);

    /* Alone, and all at once: the same bits. */
    runs[0] = make(numerals);
    runs[1] = make(other);
    generate(&runs[0]);
    generate(&runs[1]);
    runs[2] = make(numerals);
    runs[3] = make(third);
    for (i = 0; i < 4; i++) {
        if (i < 2) memset(runs[i + 2].tokens, 255, sizeof runs[0].tokens);
    }
    pthread_create(&threads[0], NULL, generate, &runs[2]);
    pthread_create(&threads[1], NULL, generate, &runs[3]);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    EXPECT(same(&runs[0], &runs[2]) && same(&runs[1], &runs[3]));
    for (i = 0; i < 4; i++) free(runs[i].logits);
    OK(moec_close(third));

    /* Text. */
    OK(moec_tokenize(numerals, "fr 1987 =", 9, 1, NULL, 0, &count));
    EXPECT(count > 1 && count <= 64);
    EXPECT(moec_tokenize(numerals, "fr 1987 =", 9, 1, tokens, count - 1, &n) == MOEC_TOO_SMALL && n == count);
    OK(moec_tokenize(numerals, "fr 1987 =", 9, 1, tokens, 64, &count));
    OK(moec_session_new(numerals, &a));
    EXPECT(moec_generate(a, 1, NULL, NULL, NULL) == MOEC_NO_LOGITS && moec_sample(a, &id) == MOEC_NO_LOGITS);
    OK(moec_feed(a, tokens, count));
    memset(&p, 0, sizeof p);
    OK(moec_fork(a, &b));
    OK(moec_generate(b, 0, collect, &p, &n));
    EXPECT(strcmp(p.text, "mille neuf cent quatre-vingt-sept") == 0 && n == p.calls);
    OK(moec_tokens(b, more, 64, &n));
    EXPECT(n == count + p.calls && memcmp(more, tokens, count * 4) == 0);
    OK(moec_detokenize(numerals, more + count, p.calls, buffer, sizeof buffer, &n));
    EXPECT(n == p.bytes && strcmp(buffer, p.text) == 0);
    EXPECT(moec_detokenize(numerals, more + count, p.calls, buffer, n, &n) == MOEC_TOO_SMALL);
    OK(moec_sample(b, &id));
    EXPECT(moec_is_end(numerals, id) == 1 && moec_is_end(numerals, more[0]) == 0);

    /* Stopped by the callback, and gone on: as if in one. */
    OK(moec_fork(a, &c));
    memset(&p, 0, sizeof p);
    p.limit = 2;
    EXPECT(moec_generate(c, 0, collect, &p, &n) == MOEC_STOPPED && n == 2);
    OK(moec_generate(c, 1, NULL, NULL, NULL));
    OK(moec_generate(c, 0, NULL, NULL, NULL));
    OK(moec_tokens(b, more, 64, &n));
    OK(moec_tokens(c, tokens, 64, &i));
    EXPECT(n == i && memcmp(more, tokens, n * 4) == 0);
    OK(moec_logits(b, x, NUMERALS_VOCAB, NULL));
    OK(moec_logits(c, y, NUMERALS_VOCAB, NULL));
    EXPECT(memcmp(x, y, sizeof x) == 0);

    /* To a file and back; going back; all rows. */
    snprintf(path, sizeof path, "%s/session", argv[3]);
    OK(moec_save(b, path));
    OK(moec_session_free(c));
    OK(moec_load(numerals, path, &c));
    OK(moec_logits(c, y, NUMERALS_VOCAB, NULL));
    EXPECT(memcmp(x, y, sizeof x) == 0);
    EXPECT(moec_load(other, path, &a) == MOEC_BAD_SESSION_FILE);
    OK(moec_rewind(c, 3));
    EXPECT(moec_logits(c, y, NUMERALS_VOCAB, NULL) == MOEC_NO_LOGITS && moec_rewind(c, 4) == MOEC_BAD_REWIND);
    rows = (float *)malloc(n * sizeof x);
    EXPECT(moec_feed_all(c, more + 3, n - 3, rows, 10) == MOEC_TOO_SMALL);
    OK(moec_feed_all(c, more + 3, n - 3, rows, (n - 3) * NUMERALS_VOCAB));
    EXPECT(memcmp(x, rows + (n - 4) * NUMERALS_VOCAB, sizeof x) == 0);
    free(rows);

    /* Sampling: a seed says it all. */
    sampling.temperature = 1.5f;
    sampling.seed = 11;
    for (i = 0; i < 2; i++) {
        OK(moec_rewind(c, 2));
        OK(moec_feed(c, more + 2, 1));
        OK(moec_set_sampling(c, &sampling));
        OK(moec_generate(c, 20, NULL, NULL, NULL));
        OK(moec_tokens(c, i == 0 ? tokens : more, 64, &count));
    }
    EXPECT(memcmp(tokens, more, count * 4) == 0);

    /* Embeddings do not depend on what else runs. */
    OK(moec_embed(numerals, tokens, 9, MOEC_POOLING_MEAN, x, NUMERALS_HIDDEN, &n));
    OK(moec_embed(numerals, tokens, 9, MOEC_POOLING_MEAN, y, NUMERALS_HIDDEN, NULL));
    EXPECT(n == NUMERALS_HIDDEN && memcmp(x, y, n * sizeof *x) == 0);
    OK(moec_embed(numerals, tokens, 9, MOEC_POOLING_LAST, y, NUMERALS_HIDDEN, NULL));
    EXPECT(memcmp(x, y, n * sizeof *x) != 0);

    /* Errors are sentences. */
    id = NUMERALS_VOCAB;
    EXPECT(moec_feed(a, &id, 1) == MOEC_BAD_TOKEN && strstr(moec_error_text(), "token id 512 does not exist"));
    EXPECT(moec_open(&numerals_model, argv[2], NULL, &third) == MOEC_WEIGHTS);
    EXPECT(strstr(moec_error_text(), "belong to another model"));
    EXPECT(moec_open(&numerals_model, "/nowhere", NULL, &third) == MOEC_WEIGHTS);
    EXPECT(moec_chat(numerals, NULL, 0, 1, NULL, 0, &n) == MOEC_CHAT && strstr(moec_error_text(), "no chat template"));
    options.level = "pentium";
    EXPECT(moec_open(&numerals_model, argv[1], &options, &third) == MOEC_CPU);
    {
        moec_model_descriptor changed = numerals_model;
        changed.abi_version++;
        EXPECT(moec_open(&changed, argv[1], NULL, &third) == MOEC_ABI_MISMATCH);
        EXPECT(strstr(moec_error_text(), "build it again with one version of moec"));
    }
    EXPECT(moec_open_memory(&other_model, (char *)bytes + 64, OTHER_PAYLOAD_BYTES, NULL, &third) == MOEC_WEIGHTS);

    /* Memory comes back; a closed model's sessions are still good. */
    OK(moec_memory(numerals, &memory, sizeof memory));
    EXPECT(memory.kv > 0 && memory.kv % memory.kv_page == 0 && memory.weights == NUMERALS_PAYLOAD_BYTES);
    OK(moec_close(numerals));
    OK(moec_feed(a, tokens, 1));
    OK(moec_session_free(c));
    EXPECT(moec_session_free(c) == MOEC_INVALID_HANDLE && moec_feed(c, tokens, 1) == MOEC_INVALID_HANDLE);
    OK(moec_feed(b, tokens, 1));
    OK(moec_session_free(a));
    OK(moec_session_free(b));
    OK(moec_memory(other, &memory, sizeof memory));
    EXPECT(memory.kv == 0);
    OK(moec_close(other));
    munmap(bytes, OTHER_PAYLOAD_BYTES);
    printf("two models: done\n");
    return 0;
}
