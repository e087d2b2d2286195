/* Calls the API with what it should refuse, thousands of times in random order, beside a session that must not notice.
 *
 *     abuse NUMERALS.weights ROUNDS SEED
 */
#include "moec.h"
#include "numerals.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition)                                                                                                \
    do {                                                                                                                 \
        if (!(condition)) {                                                                                              \
            fprintf(stderr, "line %d: %s (moec says: %s)\n", __LINE__, #condition, moec_error_text());                   \
            exit(1);                                                                                                     \
        }                                                                                                                \
    } while (0)

enum { HANDLES = 24 };

static moec_model *models[HANDLES];
static moec_session *sessions[HANDLES];
static const moec_session *busy;
static uint64_t state;

static uint32_t chance(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)((state >> 20) % below);
}

/* Handles that are open, freed, of the other kind, or never were any. */
static moec_model *any_model(void) {
    uint32_t i = chance(HANDLES + 4);
    if (i < HANDLES) return models[i];
    if (i == HANDLES) return (moec_model *)(void *)sessions[chance(HANDLES)];
    return i == HANDLES + 1 ? NULL : (moec_model *)(uintptr_t)((state & ~(uint64_t)15) | chance(16));
}

static moec_session *any_session(void) {
    uint32_t i = chance(HANDLES + 4);
    if (i < HANDLES) return sessions[i];
    if (i == HANDLES) return (moec_session *)(void *)models[chance(HANDLES)];
    return i == HANDLES + 1 ? NULL : (moec_session *)(uintptr_t)((state & ~(uint64_t)15) | chance(16));
}

/* Sizes: small, a little too large, and impossible. */
static size_t any_size(size_t fitting) {
    switch (chance(6)) {
    case 0: return 0;
    case 1: return SIZE_MAX;
    case 2: return SIZE_MAX / 4 + 1;
    default: return chance((uint32_t)fitting + 1);
    }
}

static int stop(void *user, uint32_t token, const char *text, size_t bytes) {
    size_t n = 0;
    (void)user, (void)token;
    EXPECT(text[bytes] == 0);
    /* The session of the running call is refused, and does not hang. */
    EXPECT(busy == NULL || moec_tokens(busy, NULL, 0, &n) == MOEC_BUSY);
    return chance(4) == 0;
}

int main(int argc, char **argv) {
    moec_model *model;
    moec_session *witness;
    moec_options options = moec_options_default();
    uint32_t tokens[NUMERALS_CONTEXT], i, rounds, kept = 0, refused = 0;
    static float before[NUMERALS_VOCAB], after[NUMERALS_VOCAB], rows[8 * NUMERALS_VOCAB];
    char text[512];
    size_t n;

    EXPECT(argc == 4);
    rounds = (uint32_t)atoi(argv[2]);
    state = (uint64_t)atoi(argv[3]) * UINT64_C(0x9e3779b97f4a7c15) + 1;
    options.threads = 1;
    EXPECT(moec_open(&numerals_model, argv[1], &options, &model) == MOEC_OK);
    EXPECT(moec_session_new(model, &witness) == MOEC_OK);
    for (i = 0; i < NUMERALS_CONTEXT; i++) tokens[i] = i * 31 % NUMERALS_VOCAB;
    EXPECT(moec_feed(witness, tokens, 70) == MOEC_OK);
    EXPECT(moec_logits(witness, before, NUMERALS_VOCAB, NULL) == MOEC_OK);

    for (i = 0; i < rounds; i++) {
        moec_status status = MOEC_OK;
        uint32_t slot = chance(HANDLES), call = chance(25);
        uint32_t *ids = chance(8) ? tokens : NULL;
        moec_session *s = any_session(), *fresh = NULL;
        moec_model *m = chance(3) ? model : any_model();
        size_t room = chance(8) ? NUMERALS_VOCAB : 0;
        /* Impossible sizes go with tokens that are there: only the check of the size stands between. */
        size_t count = any_size(8);
        switch (call) {
        case 0:
            if (models[slot] == NULL) status = moec_open(&numerals_model, chance(4) ? argv[1] : NULL, &options, &models[slot]);
            break;
        case 1: status = moec_close(chance(4) ? models[slot] : any_model()); break;
        case 2: case 3: status = moec_session_new(m, chance(8) ? &fresh : NULL); break;
        case 4: status = moec_session_free(chance(4) ? sessions[slot] : s); break;
        case 5: case 6: status = moec_feed(s, ids, count); break;
        case 7: status = moec_feed_all(s, ids, count, rows, 8 * NUMERALS_VOCAB); break;
        case 8: status = moec_logits(s, room ? after : NULL, room, chance(2) ? &n : NULL); break;
        case 9: status = moec_tokens(s, NULL, count, chance(2) ? &n : NULL); break;
        case 10: case 11: status = moec_fork(s, chance(8) ? &fresh : NULL); break;
        case 12: status = moec_rewind(s, any_size(NUMERALS_CONTEXT)); break;
        case 13: status = moec_save(s, chance(2) ? "/nowhere/at/all" : NULL); break;
        case 14: status = moec_load(m, chance(2) ? argv[1] : "", &fresh); break;
        case 15: {
            moec_sampling sampling = moec_sampling_default();
            sampling.temperature = chance(2) ? 1.0f : -1.0f;
            sampling.struct_bytes += chance(4) == 0;
            status = moec_set_sampling(s, chance(4) ? &sampling : NULL);
            break;
        }
        case 16: status = moec_sample(s, chance(4) ? &tokens[0] : NULL); tokens[0] %= NUMERALS_VOCAB; break;
        case 17:
            busy = s;
            status = moec_generate(s, chance(8) + 1, chance(2) ? stop : NULL, NULL, chance(2) ? &n : NULL);
            busy = NULL;
            break;
        case 18: status = moec_tokenize(m, chance(4) ? "de 21" : "\xff\xfe", chance(8) ? chance(6) : SIZE_MAX, 1, ids, any_size(4), &n); tokens[0] %= NUMERALS_VOCAB; break;
        case 19: status = moec_detokenize(m, ids, count, text, chance(512), &n); break;
        case 20: {
            moec_message message = {chance(2) ? "user" : NULL, chance(2) ? "hello" : "\xff"};
            status = moec_chat(m, chance(2) ? &message : NULL, chance(2) ? 1 : SIZE_MAX, 1, text, sizeof text, &n);
            break;
        }
        case 21: status = moec_embed(m, ids, count, chance(3), after, chance(2) ? NUMERALS_HIDDEN : 0, &n); break;
        case 22: status = moec_cancel(s); break;
        case 23: {
            moec_model_info info;
            status = moec_info(m, chance(4) ? &info : NULL, chance(4) ? sizeof info : any_size(400));
            break;
        }
        default: {
            moec_memory_use use;
            status = moec_memory(m, chance(4) ? &use : NULL, chance(4) ? sizeof use : any_size(400));
            break;
        }
        }
        if (fresh != NULL) {
            moec_session_free(sessions[slot]);
            sessions[slot] = fresh;
        }
        EXPECT(status != MOEC_BUG);
        kept += status == MOEC_OK;
        refused += status != MOEC_OK;
        EXPECT(status == MOEC_OK || strlen(moec_error_text()) > 10);
        if (i % 64 == 0) {
            moec_session *fork;
            EXPECT(moec_fork(witness, &fork) == MOEC_OK && moec_rewind(fork, 69) == MOEC_OK);
            EXPECT(moec_feed(fork, tokens + 69, 1) == MOEC_OK && moec_logits(fork, after, NUMERALS_VOCAB, NULL) == MOEC_OK);
            EXPECT(memcmp(before, after, sizeof before) == 0);
            EXPECT(moec_session_free(fork) == MOEC_OK);
        }
    }
    for (i = 0; i < HANDLES; i++) {
        moec_session_free(sessions[i]);
        moec_close(models[i]);
    }
    EXPECT(moec_session_free(witness) == MOEC_OK || moec_session_free(witness) == MOEC_INVALID_HANDLE);
    moec_close(model);
    printf("%s: %u calls done, %u refused\n", kept > rounds / 20 && refused > rounds / 10 ? "abuse" : "too few", kept, refused);
    return 0;
}
