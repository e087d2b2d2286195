/* Two shared libraries in one process, each with a runtime of its own: at once in threads, and a chat template.
 *
 *     two_libraries local|global PLAIN.so PLAIN.weights CHATTY.so CHATTY.weights DIRECTORY
 *
 * The libraries hold `plain_model` and `chatty_model`. All functions come from `dlsym`, so nothing is linked but the C library.
 */
#include "moec.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition)                                                                                                \
    do {                                                                                                                 \
        if (!(condition)) {                                                                                              \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                                      \
            exit(1);                                                                                                     \
        }                                                                                                                \
    } while (0)
#define FUNCTIONS(f)                                                                                                     \
    f(open) f(close) f(error_text) f(session_new) f(session_free) f(feed) f(generate) f(tokenize) f(chat) f(save) f(load)

typedef struct {
#define MEMBER(name) __typeof__(&moec_##name) name;
    FUNCTIONS(MEMBER)
    moec_model *model;
} library;

/* ISO C has no conversion from an object's address to a function's. */
static void find(void *handle, const char *name, void *function) {
    void *address = dlsym(handle, name);
    EXPECT(address != NULL);
    memcpy(function, &address, sizeof address);
}

static library load(int mode, const char *path, const char *descriptor, const char *weights) {
    library l;
    void *handle = dlopen(path, RTLD_NOW | mode);
    EXPECT(handle != NULL);
#define FIND(name) find(handle, "moec_" #name, (void *)&l.name);
    FUNCTIONS(FIND)
    if (l.open((const moec_model_descriptor *)dlsym(handle, descriptor), weights, NULL, &l.model) != MOEC_OK) {
        fprintf(stderr, "%s\n", l.error_text());
        exit(1);
    }
    return l;
}

typedef struct {
    const library *library;
    const char *prompt;
    char text[128];
} spelling;

static int append(void *user, uint32_t token, const char *text, size_t bytes) {
    spelling *s = (spelling *)user;
    (void)token;
    EXPECT(strlen(s->text) + bytes < sizeof s->text);
    strncat(s->text, text, bytes);
    return 0;
}

static void *spell(void *argument) {
    spelling *s = (spelling *)argument;
    const library *l = s->library;
    uint32_t tokens[64];
    size_t count;
    moec_session *session;
    EXPECT(l->tokenize(l->model, s->prompt, strlen(s->prompt), 1, tokens, 64, &count) == MOEC_OK);
    EXPECT(l->session_new(l->model, &session) == MOEC_OK);
    EXPECT(l->feed(session, tokens, count) == MOEC_OK);
    EXPECT(l->generate(session, 64, append, s, NULL) == MOEC_OK);
    EXPECT(l->session_free(session) == MOEC_OK);
    return NULL;
}

int main(int argc, char **argv) {
    moec_message message = {"user", "  it 8 = "};
    library plain, chatty;
    spelling work[4];
    pthread_t threads[4];
    moec_session *session, *foreign;
    char text[64], file[4096];
    uint32_t token = 1;
    size_t needed;
    int mode, i;
    EXPECT(argc == 7);
    mode = strcmp(argv[1], "global") == 0 ? RTLD_GLOBAL : RTLD_LOCAL;
    plain = load(mode, argv[2], "plain_model", argv[3]);
    chatty = load(mode, argv[4], "chatty_model", argv[5]);
    EXPECT(plain.open != chatty.open);

    memset(work, 0, sizeof work);
    for (i = 0; i < 4; i++) {
        work[i].library = i % 2 == 0 ? &plain : &chatty;
        work[i].prompt = i < 2 ? "fr 1987 =" : "de 21 =";
        EXPECT(pthread_create(&threads[i], NULL, spell, &work[i]) == 0);
    }
    for (i = 0; i < 4; i++) EXPECT(pthread_join(threads[i], NULL) == 0);
    for (i = 0; i < 4; i++) {
        EXPECT(strcmp(work[i].text, i < 2 ? "mille neuf cent quatre-vingt-sept" : "einundzwanzig") == 0);
    }

    /* The one has a template, the other says that it has none: each answers for itself. */
    EXPECT(chatty.chat(chatty.model, &message, 1, 1, text, sizeof text, &needed) == MOEC_OK);
    EXPECT(needed == strlen(text) && strstr(text, "it 8 =") != NULL && strstr(text, "= ") == NULL);
    EXPECT(chatty.chat(chatty.model, &message, 1, 1, text, needed, &needed) == MOEC_TOO_SMALL);
    EXPECT(plain.chat(plain.model, &message, 1, 1, text, sizeof text, &needed) == MOEC_CHAT);
    EXPECT(strstr(plain.error_text(), "no chat template") != NULL && strstr(chatty.error_text(), "no chat template") == NULL);

    /* A session of the one, alive or saved, is nothing to the other. */
    EXPECT(plain.session_new(plain.model, &session) == MOEC_OK);
    EXPECT(plain.feed(session, &token, 1) == MOEC_OK);
    EXPECT(chatty.feed(session, &token, 1) == MOEC_INVALID_HANDLE);
    snprintf(file, sizeof file, "%s/session", argv[6]);
    EXPECT(plain.save(session, file) == MOEC_OK);
    EXPECT(chatty.load(chatty.model, file, &foreign) == MOEC_BAD_SESSION_FILE);
    EXPECT(plain.load(plain.model, file, &foreign) == MOEC_OK);
    EXPECT(plain.session_free(foreign) == MOEC_OK && plain.session_free(session) == MOEC_OK);
    EXPECT(plain.close(plain.model) == MOEC_OK && chatty.close(chatty.model) == MOEC_OK);
    puts("two libraries: done");
    return 0;
}
