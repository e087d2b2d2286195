/* A C program with a model in it: spells numbers, each prompt in a fork of one session.
 *
 *     spell WEIGHTS PROMPT...
 *
 * C11, and C++ as well. */

#include "moec.h"
#include "numerals.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(moec_status status) {
    if (status == MOEC_OK) return;
    fprintf(stderr, "spell: %s\n", moec_error_text());
    exit(1);
}

/* Prints each piece of text as soon as it is certain. */
static int print(void *user, uint32_t token, const char *text, size_t text_bytes) {
    (void)token;
    fwrite(text, 1, text_bytes, (FILE *)user);
    return ferror((FILE *)user); /* not 0 stops the generation */
}

int main(int argc, char **argv) {
    moec_model *model;
    moec_session *empty;
    moec_model_info info;
    moec_memory_use memory;
    int i;

    if (argc < 3) {
        fprintf(stderr, "usage: spell WEIGHTS PROMPT...\n");
        return 2;
    }
    check(moec_open(&numerals_model, argv[1], NULL, &model));
    check(moec_info(model, &info, sizeof info));
    fprintf(stderr, "%s: %u tokens of vocabulary, context %u, code for %s, %u threads\n", info.name, info.vocab, info.context,
            info.level, info.threads);

    /* What all prompts begin with goes through the model once. */
    check(moec_session_new(model, &empty));
    if (info.bos_token >= 0) {
        uint32_t bos = (uint32_t)info.bos_token;
        check(moec_feed(empty, &bos, 1));
    }

    for (i = 2; i < argc; i++) {
        moec_session *session;
        uint32_t tokens[NUMERALS_CONTEXT];
        size_t count;
        check(moec_tokenize(model, argv[i], strlen(argv[i]), 0, tokens, NUMERALS_CONTEXT, &count));
        check(moec_fork(empty, &session));
        check(moec_feed(session, tokens, count));
        check(moec_generate(session, 64, print, stdout, NULL));
        printf("\n");
        check(moec_session_free(session));
    }

    check(moec_memory(model, &memory, sizeof memory));
    fprintf(stderr, "memory: weights %llu kB, scratch %llu kB, keys and values %llu kB\n",
            (unsigned long long)memory.weights / 1024, (unsigned long long)memory.scratch / 1024,
            (unsigned long long)memory.kv / 1024);
    check(moec_session_free(empty));
    check(moec_close(model));
    return 0;
}
