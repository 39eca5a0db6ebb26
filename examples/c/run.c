/* Runs a model that `qcc build` compiled, from C alone.
 *
 *     qcc build model.q.onnx -o model.so            (writes model.so, model.h and model.weights)
 *     cc -O2 -include model.h run.c ./model.so -lpthread -o run
 *     ./run model.weights DIM... INPUT-FILE... OUTPUT-FILE=BYTES...
 *
 * Dims in the order of model.h, then a file of raw elements for each input, then a file for each output with its size. The
 * units of each kernel are divided between two threads, to show how.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef QCC_MODEL_H
#error "give the model's header: cc -include model.h"
#endif

struct range {
    qcc_kernel kernel;
    void *const *buffers;
    const int64_t *sizes;
    int64_t begin, end;
};

static void *work(void *p) {
    struct range *r = p;
    r->kernel(r->buffers, r->sizes, r->begin, r->end);
    return NULL;
}

/* A thread for each half. A program in earnest keeps its threads. */
static void in_halves(void *context, qcc_kernel kernel, void *const *buffers, const int64_t *sizes, int64_t units,
                      int64_t work_of_one) {
    (void)context;
    struct range low = {kernel, buffers, sizes, 0, units / 2}, high = {kernel, buffers, sizes, units / 2, units};
    pthread_t other;
    /* A thread takes some ten microseconds to start. */
    if (units < 2 || units * work_of_one < 100000 || pthread_create(&other, NULL, work, &low) != 0) {
        kernel(buffers, sizes, 0, units);
        return;
    }
    work(&high);
    pthread_join(other, NULL);
}

static void *aligned(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (!p) {
        fprintf(stderr, "no room for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

static void *contents(const char *path, size_t *bytes) {
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0) {
        perror(path);
        exit(1);
    }
    *bytes = (size_t)ftell(f);
    rewind(f);
    void *p = aligned(*bytes);
    if (fread(p, 1, *bytes, f) != *bytes) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(1);
    }
    fclose(f);
    return p;
}

int main(int argc, char **argv) {
    int64_t dims[16];
    const void *inputs[16];
    void *outputs[16];
    const char *names[16];
    size_t sizes[16], bytes;
    int n_dims = 0, n_inputs = 0, n_outputs = 0, i = 2;
    if (argc < 2 || argc > 16) {
        fprintf(stderr, "usage: run WEIGHTS DIM... INPUT... OUTPUT=BYTES...\n");
        return 2;
    }
    const void *weights = contents(argv[1], &bytes);
    if (bytes != QCC_WEIGHTS_BYTES) {
        fprintf(stderr, "%s has %zu bytes, expected %llu\n", argv[1], bytes, (unsigned long long)QCC_WEIGHTS_BYTES);
        return 1;
    }
    for (; i < argc && strspn(argv[i], "0123456789") == strlen(argv[i]); i++)
        dims[n_dims++] = atoll(argv[i]);
    for (; i < argc; i++) {
        char *size = strchr(argv[i], '=');
        if (!size) {
            inputs[n_inputs++] = contents(argv[i], &bytes);
            continue;
        }
        *size = 0;
        names[n_outputs] = argv[i];
        sizes[n_outputs] = strtoull(size + 1, NULL, 10);
        outputs[n_outputs] = aligned(sizes[n_outputs]);
        n_outputs++;
    }
    int32_t code = qcc_run(dims, inputs, outputs, aligned(QCC_ARENA_BYTES), weights, in_halves, NULL);
    if (code != 0) {
        fprintf(stderr, "qcc_run returned %d: %s\n", code,
                code > 0                  ? "a dim beyond its bound"
                : code == QCC_NO_VERSION ? "code for other processors than this one"
                : code == -1             ? "other weights"
                                         : "inputs that the model cannot use");
        return 1;
    }
    for (i = 0; i < n_outputs; i++) {
        FILE *f = fopen(names[i], "wb");
        if (!f || fwrite(outputs[i], 1, sizes[i], f) != sizes[i] || fclose(f) != 0) {
            perror(names[i]);
            return 1;
        }
    }
    return 0;
}
